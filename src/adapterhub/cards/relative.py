"""Scores of systems relative to a reference system's, over the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapterhub.cards.judgments import RelativeScore
from adapterhub.cards.scores import Z_95


@dataclass(frozen=True)
class Standing:
    """One system beside the reference, both orders pooled."""

    system: str
    reference: str
    share: float | None
    """Sum of the system's points over the sum of the reference's; None when nothing was parsed."""
    interval: tuple[float, float] | None
    """95 %, questions as clusters; None for fewer than two questions."""
    reference_first: float | None
    """The share where the reference's answer was shown first; None when it never was."""
    system_first: float | None
    """The share where the system's was."""
    judgments: int
    """Parsed ones."""
    unparsed: int


def compare_with_reference(scores: Sequence[RelativeScore]) -> list[Standing]:
    """Each system's share of the reference's points, best first; both orders pooled (QLoRA, section 5)."""
    pairs = sorted({(score.system, score.reference) for score in scores})
    found = [
        _compare(system, reference, [s for s in scores if (s.system, s.reference) == (system, reference)])
        for system, reference in pairs
    ]
    return sorted(found, key=lambda s: (s.share is None, -(s.share or 0.0), s.system))


def _compare(system: str, reference: str, scores: Sequence[RelativeScore]) -> Standing:
    points = [
        (score.question, score.reference_first, score.score, score.reference_score)
        for score in scores
        if score.score is not None and score.reference_score is not None
    ]
    return Standing(
        system=system,
        reference=reference,
        share=_share([(own, other) for _, _, own, other in points]),
        interval=_interval([(question, own, other) for question, _, own, other in points]),
        reference_first=_share([(own, other) for _, after, own, other in points if after]),
        system_first=_share([(own, other) for _, after, own, other in points if not after]),
        judgments=len(points),
        unparsed=len(scores) - len(points),
    )


def _share(points: Sequence[tuple[float, float]]) -> float | None:
    """Sum over sum; None when the reference has no points at all."""
    total = math.fsum(other for _, other in points)
    return math.fsum(own for own, _ in points) / total if total else None


def _interval(points: Sequence[tuple[str, float, float]]) -> tuple[float, float] | None:
    """The ratio estimator's 95 % interval (Cochran, Sampling Techniques, section 6.4), by question."""
    share = _share([(own, other) for _, own, other in points])
    questions = sorted({question for question, _, _ in points})
    if share is None or len(questions) < 2:
        return None
    residuals = dict.fromkeys(questions, 0.0)
    for question, own, other in points:
        residuals[question] += own - share * other
    total = math.fsum(other for _, _, other in points)
    squares = math.fsum(residual**2 for residual in residuals.values())
    half = Z_95 * math.sqrt(len(questions) / (len(questions) - 1) * squares) / total
    return max(0.0, share - half), share + half
