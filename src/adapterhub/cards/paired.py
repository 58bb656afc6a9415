"""Paired tests: whether two models show a difference on the same questions, or only noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adapterhub.cards.losses import RowLoss
from adapterhub.cards.scores import Z_95
from adapterhub.packaging.evidence import Finding

SIGNIFICANCE = 0.05
"""Two-sided; of a family of tests, the chance that any finds a difference where there is none."""


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test, two-sided: the p-value of ``gained`` against ``lost`` discordant questions.

    Under no difference each discordant question falls to either side with probability 1/2: twice the smaller
    binomial tail, at most 1 (McNemar, Psychometrika 1947; the exact form). 1 where nothing is discordant.
    """
    discordant = gained + lost
    term, tail = 1, 1  # binomial coefficients, as integers: exact for any count
    for k in range(1, min(gained, lost) + 1):
        term = term * (discordant - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**discordant)


def holm(p_values: Sequence[float]) -> list[float]:
    """``p_values`` adjusted for there being several (Holm, Scand. J. Statistics 1979), in order.

    Of all that stay below 0.05, the chance that any is noise is below 0.05.
    """
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def find(gained: float, lost: float, p_value: float) -> Finding:
    """What a test shows of the side that gained."""
    if p_value >= SIGNIFICANCE or gained == lost:
        return "no difference shown"
    return "better" if gained > lost else "worse"


def count_discordant(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """How many questions only ``second`` gets right (gained), and how many only ``first`` (lost)."""
    pairs = list(zip(first, second, strict=True))
    return sum(right and not before for before, right in pairs), sum(
        before and not right for before, right in pairs
    )


def loss_difference(
    of: Sequence[RowLoss], minus: Sequence[RowLoss]
) -> tuple[float, tuple[float, float] | None]:
    """The mean difference of two models' losses on the same rows, nats a token, and its 95 % interval.

    Rows are clusters, paired: the ratio estimator of the rows' differences over their tokens (Cochran,
    Sampling Techniques, section 6.4), normal approximation. No interval for fewer than two rows.
    """
    rows = len(of)
    tokens = sum(loss.tokens for loss in of)
    differences = [a.nats - b.nats for a, b in zip(of, minus, strict=True)]
    mean = sum(differences) / tokens
    if rows < 2:
        return mean, None
    residuals = sum((d - mean * loss.tokens) ** 2 for d, loss in zip(differences, of, strict=True))
    half = Z_95 * math.sqrt(rows / (rows - 1) * residuals) / tokens
    return mean, (mean - half, mean + half)


def find_in_losses(interval: tuple[float, float] | None) -> Finding | None:
    """What the interval of a difference in loss shows of the first model: below 0 it is better."""
    if interval is None:
        return None
    if interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    return "better" if interval[1] < 0 else "worse"
