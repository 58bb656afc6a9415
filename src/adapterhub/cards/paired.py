"""Paired tests: whether the same questions answered by two models show a difference, or only noise."""

from __future__ import annotations

from collections.abc import Sequence

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
