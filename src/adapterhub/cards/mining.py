"""Failure cases searched for: of what fails, the telling ones, each kind of failure a few times."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from adapterhub.cards.failures import worst_first
from adapterhub.packaging.evidence import FailureCase

_ALIKE = 2


def choose_cases(
    found: Sequence[FailureCase], known: Sequence[FailureCase], each: int
) -> tuple[FailureCase, ...]:
    """At most ``each`` new cases of a class, marked as mined.

    Left out are ``known`` ones, and what a class answers alike for the third time, whatever was asked (an
    adapter that says the same to everything does not fail in a hundred ways). Those that the base gets right
    come first, then those least like what was expected.
    """
    known_ids = {case.id for case in known}
    said = Counter(_answer(case) for case in known)
    chosen: dict[str, list[FailureCase]] = defaultdict(list)
    for case in worst_first(found):
        ours = chosen[case.failure_class]
        if case.id in known_ids or said[_answer(case)] >= _ALIKE or len(ours) == each:
            continue
        said[_answer(case)] += 1
        ours.append(case.model_copy(update={"found_in": "mining"}))
    kept = {case.id: case for cases in chosen.values() for case in cases}
    return tuple(kept[case.id] for case in found if case.id in kept)


def _answer(case: FailureCase) -> tuple[str, str]:
    return case.failure_class, " ".join(case.observed.casefold().split())
