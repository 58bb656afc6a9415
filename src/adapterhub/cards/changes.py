"""What changed since an earlier version, in words and tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapterhub.cards.card import ADAPTER_WEIGHTS, Card
from adapterhub.cards.escaping import one_line
from adapterhub.cards.formats import METRICS, NOT_MEASURED, in_figures, in_interval, in_p_value, in_percent
from adapterhub.cards.formats import in_percent_interval as in_shares
from adapterhub.cards.paired import find, mcnemar
from adapterhub.cards.tables import Table, code, make_table, strong
from adapterhub.errors import ReleaseError
from adapterhub.packaging.changes import ChangedCase, ChangedPart, ChangedScore, ChangesEvidence
from adapterhub.packaging.comparison import Comparison
from adapterhub.packaging.evidence import FailureCase
from adapterhub.packaging.manifest import Parent

_SHOWN = 10
_QUESTION_CHARS = 200
_OF_THE_CARD = ("card", "evidence")
"""Parts that the card itself shows."""


@dataclass(frozen=True)
class Changes:
    """The section's content."""

    summary: str
    parts: tuple[str, ...]
    scores: Table | None
    cases: tuple[Table, ...]


def since_earlier(found: Comparison, ref: str) -> ChangesEvidence:
    """What a comparison of an earlier version (A, which ``ref`` names) with this one (B) says, as evidence.

    Raises ReleaseError for the same release twice, and for one without an adapter.
    """
    earlier, this = found.a, found.b
    weights = this.manifest.files.get(ADAPTER_WEIGHTS)
    if weights is None:
        raise ReleaseError(f"{this.path} holds no adapter", "compare the adapters that were merged")
    if earlier.digest == this.digest:
        raise ReleaseError(f"{ref} is the release itself", "name an earlier version")
    cases = found.failures
    p_value = mcnemar(len(cases.fixed), len(cases.new)) if found.scores.alike else None
    why_not = found.scores.why_not
    return ChangesEvidence(
        since=Parent(ref=ref, manifest_sha256=earlier.digest),
        since_version=earlier.manifest.version,
        adapter_sha256=weights.sha256,
        parts=tuple(
            ChangedPart(part=change.part, what=change.what)
            for change in found.changes
            if change.part not in _OF_THE_CARD
        ),
        asked_alike=found.scores.alike,
        why_not=why_not and _in_versions(why_not),
        scores=tuple(
            ChangedScore(
                metric=pair.metric,
                before=pair.a.adapter if pair.a else None,
                before_interval=pair.a.adapter_interval if pair.a else None,
                after=pair.b.adapter if pair.b else None,
                after_interval=pair.b.adapter_interval if pair.b else None,
            )
            for pair in found.scores.pairs
        ),
        fixed=_short(cases.fixed),
        regressed=_short(cases.new),
        still=_short(cases.still),
        new=_short(cases.only_b),
        not_asked=_short(cases.only_a),
        p_value=p_value,
        verdict=None if p_value is None else find(len(cases.fixed), len(cases.new), p_value),
    )


def _in_versions(why_not: str) -> str:
    """A comparison speaks of A and B."""
    words = {"A": "the earlier version", "B": "this version"}
    return " ".join(words.get(word, word) for word in why_not.split(" "))


def _short(cases: tuple[FailureCase, ...]) -> tuple[ChangedCase, ...]:
    return tuple(
        ChangedCase(
            id=case.id,
            failure_class=case.failure_class,
            question=one_line(case.messages[-1]["content"])[:_QUESTION_CHARS] if case.messages else "",
        )
        for case in cases
    )


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
