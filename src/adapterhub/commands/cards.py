"""card."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub.commands.targets import refuse_cached


@click.command("card")
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; fail when the card does not match the evidence.")
def card_command(release: Path, check: bool) -> None:
    """Make README.md and card.html of the folder RELEASE from its manifest and evidence."""
    from adapterhub.cards.card import read_card
    from adapterhub.cards.rendering import check_files, render_files
    from adapterhub.packaging.release import Release

    opened = Release.open(release)
    files = render_files(read_card(opened))
    if check:
        check_files(opened, files)
        click.echo(f"the card of {release} matches its evidence")
        return
    refuse_cached(release)
    opened.with_files(files)
    for name in files:
        click.echo(release / name)
