"""arena import, arena report; `contests` has arena judge and arena people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.contests import judge_command, people_command
from adapterhub.errors import DataError

if TYPE_CHECKING:
    from adapterhub.cards.agreement import Agreement, PositionBias
    from adapterhub.cards.duels import Duel
    from adapterhub.cards.judgments import Arena, Judgment
    from adapterhub.cards.ratings import Method, Ratings
    from adapterhub.cards.relative import Standing

_K = 4.0
_ORDERINGS = 10_000


@click.group("arena")
def arena_command() -> None:
    """Compare systems by judgments of their answers: ratings with intervals, bias and agreement."""


arena_command.add_command(judge_command)
arena_command.add_command(people_command)


@arena_command.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="The arena's folder. Default: the first file's name."
)
def import_command(files: tuple[Path, ...], out: Path | None) -> None:
    """Read judgments from CSV or JSONL files into a new arena, and print its folder.

    Pairwise: question_id,first,second,verdict with the verdict 1 (the first shown is better), 2 (the
    second), 3 (tie) or -1 (not parsed), or v1,v2,v3 in place of verdict for three raters. Relative to a
    reference: question_id,system,order,NAME,score, where the column NAME holds the reference's points and
    the order is NAME_first or system_first.
    """
    from adapterhub.cards.judgments import import_files, write_arena

    arena = import_files(files)
    folder = out or Path(files[0].stem)
    write_arena(arena, folder)
    unparsed = sum(judgment.verdict == "unparsed" for judgment in arena.pairwise)
    unparsed += sum(score.score is None or score.reference_score is None for score in arena.relative)
    click.echo(
        f"{len(arena.pairwise):,} pairwise judgments and {len(arena.relative):,} relative scores, "
        f"{unparsed:,} of them not parsed",
        err=True,
    )
    click.echo(folder)


@arena_command.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--rating", type=click.Choice(["elo", "bt"]), default="elo", show_default=True, help="bt: Bradley-Terry."
)
@click.option("--k", type=click.FloatRange(min=0, min_open=True), help="Elo's K. Default: 4.")
@click.option("--orderings", type=click.IntRange(min=1), help="Elo's random orderings. Default: 10000.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def report_command(
    folder: Path, rating: Method, k: float | None, orderings: int | None, as_json: bool
) -> None:
    """Rate the systems of the arena DIR.

    Elo starts at 1000 and is averaged over random orders of the judgments; its interval is what 95 % of the
    orders give. Bradley-Terry does not depend on the order; its interval is a bootstrap over the questions.
    A tie is half a win; a judgment that was not parsed is counted and left out.
    """
    from adapterhub.cards.agreement import measure_agreement, measure_position_bias
    from adapterhub.cards.duels import hold_duels
    from adapterhub.cards.judgments import read_arena
    from adapterhub.cards.ratings import (
        estimate_by_bradley_terry,
        rate_by_bradley_terry,
        rate_by_elo,
    )
    from adapterhub.cards.relative import compare_with_reference

    if rating == "bt" and (k is not None or orderings is not None):
        raise click.UsageError("--k and --orderings belong to --rating elo")

    def rate(judgments: Sequence[Judgment]) -> Ratings:
        if rating == "bt":
            return rate_by_bradley_terry(judgments)
        return rate_by_elo(judgments, _K if k is None else k, orderings or _ORDERINGS)

    def rate_alone(judgments: Sequence[Judgment]) -> Mapping[str, float]:
        if rating == "bt":
            return estimate_by_bradley_terry(judgments)
        return {system.system: system.rating for system in rate(judgments).systems}

    arena = read_arena(folder)
    if not arena.pairwise and not arena.relative:
        raise DataError(f"{folder} holds no judgments", "import some: adapterhub arena import FILE")
    report = _Report(
        arena,
        rate(arena.pairwise) if arena.pairwise else None,
        measure_position_bias(arena.pairwise),
        measure_agreement(arena.pairwise, rate_alone),
        compare_with_reference(arena.relative),
        hold_duels(arena.pairwise),
    )
    click.echo(report.as_json() if as_json else report.as_text())


class _Report:
    """Everything that is printed of an arena."""

    def __init__(
        self,
        arena: Arena,
        ratings: Ratings | None,
        bias: PositionBias | None,
        agreement: Agreement | None,
        standings: list[Standing],
        duels: list[Duel],
    ) -> None:
        self.arena = arena
        self.ratings = ratings
        self.bias = bias
        self.agreement = agreement
        self.standings = standings
        self.duels = duels
        self.unparsed = sum(judgment.verdict == "unparsed" for judgment in arena.pairwise)

    def as_json(self) -> str:
        from adapterhub.cards.ratings import SEED

        document: dict[str, Any] = {
            "sources": [source.model_dump() for source in self.arena.sources],
            "judgments": len(self.arena.pairwise),
            "unparsed": self.unparsed,
            "seed": SEED,
            "ratings": self.ratings and asdict(self.ratings),
            "duels": [asdict(duel) for duel in self.duels],
            "position_bias": self.bias and asdict(self.bias),
            "agreement": self.agreement and asdict(self.agreement),
            "relative": [asdict(standing) for standing in self.standings],
        }
        return json.dumps(document, indent=2, ensure_ascii=False)

    def as_text(self) -> str:
        parts = []
        if self.ratings:
            parts += [_ratings_table(self.ratings), self._pairwise_words(self.ratings)]
            parts.append(_duels_table(self.duels))
        if self.agreement:
            parts.append(_agreement_table(self.agreement))
        if self.standings:
            parts.append(_standings_table(self.standings))
        return "\n\n".join(parts)

    def _pairwise_words(self, ratings: Ratings) -> str:
        lines = [f"judgments: {len(self.arena.pairwise):,}, {self.unparsed:,} of them not parsed"]
        if ratings.method == "elo":
            lines.append(
                f"Elo, K {ratings.k:g}, {ratings.draws:,} random orderings; interval: over orderings"
            )
        else:
            lines.append(f"Bradley-Terry; interval: bootstrap over questions, {ratings.draws:,} resamples")
        if ratings.unbounded_draws:
            lines.append(
                f"{ratings.unbounded_draws:,} more resamples were left out: no finite ratings exist there, "
                "so the intervals are too narrow"
            )
        if self.bias is None:
            lines.append("position bias: not measured (no pair was judged in both orders)")
        else:
            lines.append(_bias_in_words(self.bias))
        return "\n".join(lines)


def _bias_in_words(bias: PositionBias) -> str:
    same = (
        f"same verdict in both orders: {_percent(bias.consistent)} of {bias.pairs:,} pairs "
        f"({_percents(bias.consistent_interval)})"
    )
    if bias.first is None:
        return f"position bias: all ties; {same}"
    return (
        f"position bias: the first answer wins {_percent(bias.first)} of {bias.decided:,} decided verdicts "
        f"({_percents(bias.first_interval)}); {same}"
    )


def _ratings_table(ratings: Ratings) -> str:
    head = ("rank", "system", "rating", "95 % interval", "wins", "ties", "losses")
    rows = [
        (
            str(system.rank),
            system.system,
            f"{system.rating:.0f}",
            f"{system.interval[0]:.0f} to {system.interval[1]:.0f}",
            *(str(count) for count in (system.wins, system.ties, system.losses)),
        )
        for system in ratings.systems
    ]
    return _align([head, *rows], left=1)


def _duels_table(duels: Sequence[Duel]) -> str:
    from adapterhub.cards.formats import in_p_value

    head = ("system", "beside", "share", "questions won", "lost", "level", "p", "the test shows")
    rows = [
        (
            duel.a,
            duel.b,
            _percent(duel.share),
            *(str(count) for count in (duel.won, duel.lost, duel.level)),
            in_p_value(duel.p_value),
            duel.finding,
        )
        for duel in duels
    ]
    return _align([head, *rows], left=0)


def _agreement_table(agreement: Agreement) -> str:
    words = (
        f"agreement of {len(agreement.raters)} raters on {agreement.items:,} items: "
        f"Fleiss' kappa {_figure(agreement.fleiss_kappa)}"
    )
    head = ("raters", "items", "Cohen's kappa", "systems", "Kendall's tau", "Spearman's rho")
    rows = [
        (
            " and ".join(pair.raters),
            str(pair.items),
            _figure(pair.kappa),
            str(pair.systems),
            _figure(pair.tau),
            _figure(pair.rho),
        )
        for pair in agreement.pairs
    ]
    return words + "\n" + _align([head, *rows], left=0)


def _standings_table(standings: Sequence[Standing]) -> str:
    head = (
        "system", "reference", "score", "95 % interval",
        "reference first", "system first", "judgments", "not parsed",
    )  # fmt: skip
    rows = [
        (
            standing.system,
            standing.reference,
            _percent(standing.share),
            _percents(standing.interval),
            _percent(standing.reference_first),
            _percent(standing.system_first),
            str(standing.judgments),
            str(standing.unparsed),
        )
        for standing in standings
    ]
    return _align([head, *rows], left=0)


def _align(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns of equal width; the one at ``left`` is aligned left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"


def _percents(interval: tuple[float, float] | None) -> str:
    return "not measured" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def _figure(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
