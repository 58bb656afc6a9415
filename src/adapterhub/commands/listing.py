"""Options that take several values in a row: `--probes math refusal`."""

from __future__ import annotations

import click


class ListingCommand(click.Command):
    """A command whose repeatable options take further values without their name being repeated.

    They are taken once the command's arguments are all there, and up to the next option: in
    ``eval RELEASE --probes A B`` both are probes; in ``eval --probes A RELEASE`` the last one is the release.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Name the option again before each further value, and read that as click does."""
        return super().parse_args(ctx, self._spread(args))

    def _spread(self, args: list[str]) -> list[str]:
        options = {
            name: it
            for it in self.params
            if isinstance(it, click.Option)
            for name in (*it.opts, *it.secondary_opts)
        }
        missing = sum(isinstance(it, click.Argument) for it in self.params)
        spread: list[str] = []
        listing: str | None = None  # the option that further values are of
        left = iter(args)
        for word in left:
            if word == "--":
                return [*spread, word, *left]
            if word.startswith("-") and word != "-":
                spread.append(word)
                option = options.get(word.partition("=")[0])
                listing = word.partition("=")[0] if option is not None and option.multiple else None
                if option is not None and not option.is_flag and "=" not in word:
                    spread += [value for value in [next(left, None)] if value is not None]
            elif listing is not None and not missing:
                spread += [listing, word]
            else:
                missing -= 1
                spread.append(word)
        return spread
