"""What changed since an earlier version, in words and tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapterhub.cards.card import Card
from adapterhub.cards.formats import METRICS, NOT_MEASURED, in_figures, in_interval, in_p_value, in_percent
from adapterhub.cards.formats import in_percent_interval as in_shares
from adapterhub.cards.tables import Table, code, make_table, strong
from adapterhub.packaging.changes import ChangedCase, ChangedScore, ChangesEvidence

_SHOWN = 10


@dataclass(frozen=True)
class Changes:
    """The section's content."""

    summary: str
    parts: tuple[str, ...]
    scores: Table | None
    cases: tuple[Table, ...]


def describe_changes(card: Card) -> Changes | None:
    """What became better and worse; None where nobody compared."""
    changes = card.changes
    if changes is None:
        return None
    return Changes(
        summary=_summarize(changes),
        parts=tuple(f"{part.part}: {part.what}" for part in changes.parts),
        scores=_tabulate_scores(changes) if changes.scores else None,
        cases=tuple(_tabulate_cases(changes)),
    )


def _summarize(changes: ChangesEvidence) -> str:
    since = f"Since {changes.since.ref}, version {changes.since_version}: "
    counts = (
        f"{len(changes.fixed):,} failure cases fixed, {len(changes.regressed):,} regressions, "
        f"{len(changes.still):,} still failing, {len(changes.new):,} new that were not asked before, "
        f"{len(changes.not_asked):,} of the earlier ones not asked again."
    )
    if not changes.asked_alike:
        return f"{since}{counts} The two cannot be held against each other row by row: {changes.why_not}."
    test = f"Paired test of fixed against regressions: {changes.verdict} (p {in_p_value(changes.p_value)})."
    return f"{since}{counts} {test}"


def _tabulate_scores(changes: ChangesEvidence) -> Table:
    columns = ("metric", f"#{changes.since_version}", "#95 % interval", "#this version", "#95 % interval")
    return make_table("Scores of both versions", columns, map(_score_row, changes.scores))


def _score_row(score: ChangedScore) -> tuple[str, ...]:
    def value(figure: float | None) -> str:
        if figure is None:
            return NOT_MEASURED
        return in_percent(figure) if score.metric == "exact_match" else in_figures(figure)

    def interval(bounds: tuple[float, float] | None) -> str:
        return in_shares(bounds) if bounds and score.metric == "exact_match" else in_interval(bounds)

    return (
        METRICS.get(score.metric, score.metric),
        value(score.before),
        interval(score.before_interval),
        value(score.after),
        interval(score.after_interval),
    )


def _tabulate_cases(changes: ChangesEvidence) -> Iterator[Table]:
    for name, cases in (
        ("Regressions", changes.regressed),
        ("Fixed", changes.fixed),
        ("New, not asked before", changes.new),
    ):
        if cases:
            yield _tabulate(name, cases)


def _tabulate(name: str, cases: tuple[ChangedCase, ...]) -> Table:
    label = name if len(cases) <= _SHOWN else f"{name}, {_SHOWN} of {len(cases):,}"
    rows = ((code(case.id), case.failure_class, strong(case.question)) for case in cases[:_SHOWN])
    return make_table(label, (f"{label}: case", "class", "question"), rows)
