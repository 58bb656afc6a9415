"""How far raters agree with each other and with themselves: kappas, rank correlations, position bias."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from adapterhub.cards.judgments import Judgment
from adapterhub.cards.scores import wilson_interval

Choice = Literal["a", "b", "tie"]
"""Which of a pair was better, whichever was shown first: ``a`` is the one whose name sorts first."""
Item = tuple[str, str, str]
"""A question and a pair of systems, their names sorted."""


@dataclass(frozen=True)
class PositionBias:
    """What the place of an answer does, over pairs that one rater judged in both orders."""

    pairs: int
    """Both verdicts parsed."""
    consistent: float
    """The share of pairs with the same verdict in both orders."""
    consistent_interval: tuple[float, float]
    """95 %, Wilson."""
    decided: int
    """Their verdicts that are no ties."""
    first: float | None
    """The share of those for the answer shown first: 0.5 without bias. None when all are ties."""
    first_interval: tuple[float, float] | None
    """95 %, Wilson."""


@dataclass(frozen=True)
class RaterPair:
    """Two raters beside each other."""

    raters: tuple[str, str]
    items: int
    """Questions with a pair of systems that both judged."""
    kappa: float | None
    """Cohen's, over the items; None when chance alone would agree always."""
    tau: float | None
    """Kendall's tau-b of their ratings of the systems; None when one of them ties all systems."""
    rho: float | None
    """Spearman's."""
    systems: int
    """Systems that both rated."""


@dataclass(frozen=True)
class Agreement:
    """How far the raters agree."""

    raters: tuple[str, ...]
    items: int
    """Judged by two raters or more."""
    fleiss_kappa: float | None
    pairs: tuple[RaterPair, ...]


def measure_position_bias(judgments: Sequence[Judgment]) -> PositionBias | None:
    """What the order of two answers does; None when no rater judged a pair in both orders.

    Pairs judged in one order only are left out: there, the place cannot be told from the system.
    """
    shown: dict[tuple[str, Item], dict[str, str]] = defaultdict(dict)
    for judgment in judgments:
        if judgment.verdict != "unparsed":
            shown[judgment.rater, _item(judgment)][judgment.first] = judgment.verdict
    both = [tuple(verdicts.values()) for verdicts in shown.values() if len(verdicts) == 2]
    if not both:
        return None
    mirrored = {("first", "second"), ("second", "first"), ("tie", "tie")}
    consistent = sum(verdicts in mirrored for verdicts in both)
    places = Counter(verdict for verdicts in both for verdict in verdicts)
    decided = places["first"] + places["second"]
    return PositionBias(
        pairs=len(both),
        consistent=consistent / len(both),
        consistent_interval=wilson_interval(consistent, len(both)),
        decided=decided,
        first=places["first"] / decided if decided else None,
        first_interval=wilson_interval(places["first"], decided) if decided else None,
    )


def measure_agreement(
    judgments: Sequence[Judgment], rate: Callable[[Sequence[Judgment]], Mapping[str, float]]
) -> Agreement | None:
    """How far raters agree item by item and in their ratings of the systems; None with one rater alone.

    A rater who judged an item more than once counts with the verdict given most often, with a tie when there
    is none. ``rate`` turns one rater's judgments into a rating of each system, or into nothing when these do
    not give one.
    """
    choices = {rater: _choices(own) for rater, own in _by_rater(judgments).items()}
    raters = sorted(rater for rater, own in choices.items() if own)
    if len(raters) < 2:
        return None
    items = sorted({item for rater in raters for item in choices[rater]})
    rated = [[choices[rater][item] for rater in raters if item in choices[rater]] for item in items]
    shared = [verdicts for verdicts in rated if len(verdicts) > 1]
    ratings = {rater: rate(_by_rater(judgments)[rater]) for rater in raters}
    pairs = []
    for one, other in combinations(raters, 2):
        common = sorted(choices[one].keys() & choices[other].keys())
        systems = sorted(ratings[one].keys() & ratings[other].keys())
        by_one, by_other = ([ratings[rater][system] for system in systems] for rater in (one, other))
        kappa = cohen_kappa([(choices[one][item], choices[other][item]) for item in common])
        tau, rho = kendall_tau(by_one, by_other), spearman_rho(by_one, by_other)
        pairs.append(RaterPair((one, other), len(common), kappa, tau, rho, len(systems)))
    return Agreement(tuple(raters), len(shared), fleiss_kappa(shared), tuple(pairs))


def fleiss_kappa(items: Sequence[Sequence[Hashable]]) -> float | None:
    """Agreement of many raters beyond chance (Fleiss, Psychological Bulletin 1971, equations 1 to 8).

    Each item is the categories that its raters chose, two or more. The paper has equally many for each; with
    unequal numbers an item's agreement is taken over its own pairs of raters, and the mean over the items.
    None without items, and when all chose one category: chance explains that fully.
    """
    if not items:
        return None
    agreed = [
        sum(count * (count - 1) for count in Counter(item).values()) / (len(item) * (len(item) - 1))
        for item in items
    ]
    totals = Counter(category for item in items for category in item)
    ratings = sum(totals.values())
    if len(totals) == 1:
        return None
    by_chance = sum((count / ratings) ** 2 for count in totals.values())
    return (math.fsum(agreed) / len(items) - by_chance) / (1 - by_chance)


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Agreement of two raters beyond chance (Cohen, Educational and Psychological Measurement 1960).

    None without pairs, and when both always chose the same one category.
    """
    if not pairs:
        return None
    count = len(pairs)
    ones, others = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    by_chance = sum(ones[category] * others[category] for category in ones) / count**2
    if by_chance == 1:
        return None
    agreed = sum(one == other for one, other in pairs) / count
    return (agreed - by_chance) / (1 - by_chance)


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b, which allows for ties (Biometrika 1945); None when one side ties everything."""
    signs = [
        (_sign(one[i] - one[j]), _sign(other[i] - other[j])) for i, j in combinations(range(len(one)), 2)
    ]
    untied_one, untied_other = sum(a != 0 for a, _ in signs), sum(b != 0 for _, b in signs)
    if not untied_one or not untied_other:
        return None
    return sum(a * b for a, b in signs) / math.sqrt(untied_one * untied_other)


def spearman_rho(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rho: Pearson's correlation of the ranks, ties at their mean rank (Kendall, 1948, chapter 3).

    None when one side ties everything.
    """
    ranks, others = _ranks(one), _ranks(other)
    middle = (len(one) + 1) / 2
    spread = math.sqrt(sum((r - middle) ** 2 for r in ranks) * sum((r - middle) ** 2 for r in others))
    if not spread:
        return None
    return sum((a - middle) * (b - middle) for a, b in zip(ranks, others, strict=True)) / spread


def _item(judgment: Judgment) -> Item:
    first, second = sorted((judgment.first, judgment.second))
    return judgment.question, first, second


def _by_rater(judgments: Sequence[Judgment]) -> dict[str, list[Judgment]]:
    found: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        if judgment.verdict != "unparsed":
            found[judgment.rater].append(judgment)
    return found


def _choices(judgments: Sequence[Judgment]) -> dict[Item, Choice]:
    """One rater's choice for each item."""
    given: dict[Item, Counter[Choice]] = defaultdict(Counter)
    for judgment in judgments:
        if judgment.verdict == "tie":
            choice: Choice = "tie"
        else:
            a_is_first = judgment.first < judgment.second
            choice = "a" if (judgment.verdict == "first") == a_is_first else "b"
        given[_item(judgment)][choice] += 1
    return {item: _most_frequent(counts) for item, counts in given.items()}


def _most_frequent(counts: Counter[Choice]) -> Choice:
    (best, votes), *rest = counts.most_common()
    return "tie" if rest and rest[0][1] == votes else best


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their places."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
