"""Two systems at a time: who is preferred on how many questions, and whether that is more than noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from adapterhub.cards.judgments import Judgment
from adapterhub.cards.paired import find, holm, mcnemar
from adapterhub.packaging.evidence import Finding

_POINTS = {"first": 1.0, "second": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Duel:
    """What the judgments say of ``a`` beside ``b``."""

    a: str
    b: str
    judgments: int
    """Parsed ones."""
    share: float
    """Of the points that ``a`` gets: 1 for each verdict for it, a half for a tie."""
    won: int
    """Questions where ``a`` gets more than half of the points, over all raters and both orders."""
    lost: int
    level: int
    p_value: float
    """The exact sign test of ``won`` against ``lost``, two-sided, after Holm's correction for all duels."""
    finding: Finding
    """What it shows of ``a`` at 5 %."""


def hold_duels(judgments: Sequence[Judgment]) -> list[Duel]:
    """Every two systems that were judged beside each other, by name.

    Questions are the unit of the test: the verdicts on one question, of several raters and in both orders,
    are no independent ones.
    """
    points: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for judgment in judgments:
        if judgment.verdict == "unparsed":
            continue
        gained = _POINTS[judgment.verdict]
        if judgment.first < judgment.second:
            points[judgment.first, judgment.second][judgment.question].append(gained)
        else:
            points[judgment.second, judgment.first][judgment.question].append(1 - gained)
    systems = sorted({system for pair in points for system in pair})
    pairs = [pair for pair in combinations(systems, 2) if pair in points]
    counts = [_count(list(points[pair].values())) for pair in pairs]
    adjusted = holm([mcnemar(won, lost) for won, lost, _ in counts])
    return [
        Duel(
            a=a,
            b=b,
            judgments=sum(map(len, points[a, b].values())),
            share=sum(map(sum, points[a, b].values())) / sum(map(len, points[a, b].values())),
            won=won,
            lost=lost,
            level=level,
            p_value=p_value,
            finding=find(won, lost, p_value),
        )
        for (a, b), (won, lost, level), p_value in zip(pairs, counts, adjusted, strict=True)
    ]


def _count(questions: Sequence[Sequence[float]]) -> tuple[int, int, int]:
    """Questions won, lost and level."""
    won = sum(2 * sum(points) > len(points) for points in questions)
    lost = sum(2 * sum(points) < len(points) for points in questions)
    return won, lost, len(questions) - won - lost
