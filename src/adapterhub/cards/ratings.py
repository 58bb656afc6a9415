"""Ratings of systems from pairwise judgments: Elo over random orderings, and Bradley-Terry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adapterhub.cards.judgments import Judgment
from adapterhub.errors import DataError

START = 1000.0
"""Every system's Elo before its first match, and the mean of Bradley-Terry ratings."""
SCALE = 400.0
"""A lead of so many points makes the odds of being judged better ten to one (Elo, 1978)."""
SEED = 0
"""Of the random orderings and resamples: a rerun gives the same figures."""
RESAMPLES = 1000
_ORDERINGS_AT_ONCE = 1024
_MAX_STEPS = 100_000
_TOLERANCE = 1e-10

Method = Literal["elo", "bt"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rating:
    """One system's rating, in points."""

    system: str
    rank: int
    """1 is the best."""
    rating: float
    """Elo: the mean over the orderings. Bradley-Terry: the maximum-likelihood estimate."""
    interval: tuple[float, float]
    """Elo: what 95 % of the orderings give. Bradley-Terry: the 95 % bootstrap interval over questions."""
    mean_error: float | None
    """Elo: half the width of the 95 % interval of the mean over orderings. None for Bradley-Terry."""
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Ratings:
    """The ratings of all systems, best first."""

    method: Method
    systems: tuple[Rating, ...]
    k: float | None
    """Elo: the most points that one match moves."""
    draws: int
    """Elo: orderings. Bradley-Terry: resamples that the interval stands on."""
    unbounded_draws: int
    """Bradley-Terry: resamples left out because some systems never lose to the others there. Elo: 0."""


def rate_by_elo(judgments: Sequence[Judgment], k: float, orderings: int) -> Ratings:
    """Elo ratings: each judgment is a match, a tie half a win, and the order of matches is drawn anew.

    The ratings after the last match are averaged over ``orderings`` random orders, as QLoRA's section 5.2
    does, since Elo depends on the order. Its interval covers that alone, not which questions were asked. The
    orderings run side by side: the state is (systems, orderings) in float64. Unparsed verdicts are no match.
    Raises DataError when no verdict was parsed.
    """
    matches = _Matches.of(judgments)
    generator = np.random.default_rng(SEED)
    parts = [
        _play(matches, k, min(_ORDERINGS_AT_ONCE, orderings - done), generator)
        for done in range(0, orderings, _ORDERINGS_AT_ONCE)
    ]
    final = np.concatenate(parts, axis=1)
    low, high = np.percentile(final, [2.5, 97.5], axis=1)
    error = 1.96 * final.std(axis=1, ddof=1) / np.sqrt(orderings) if orderings > 1 else None
    systems = _ranked(matches, final.mean(axis=1), low, high, error)
    return Ratings("elo", systems, k, orderings, 0)


def rate_by_bradley_terry(judgments: Sequence[Judgment], resamples: int = RESAMPLES) -> Ratings:
    """Bradley-Terry ratings (Biometrika 1952): the strengths under which the judgments are most likely.

    A tie is half a win for each. Strengths come from Hunter's MM algorithm (Annals of Statistics 2004,
    section 3) and are shown on Elo's scale with mean 1000. The interval is the percentile bootstrap over
    questions: judgments of one question hang together. Raises DataError when no verdict was parsed, and
    when the estimate does not exist because some systems were never beaten by the others (Ford, 1957).
    """
    matches = _Matches.of(judgments)
    by_question = matches.wins_by_question()
    wins = by_question.sum(axis=0)
    if not _is_connected(wins[None])[0]:
        raise DataError(
            "Bradley-Terry gives no finite ratings: some systems never win or tie against the others",
            "use --rating elo, or collect judgments that connect all systems",
        )
    generator = np.random.default_rng(SEED)
    questions, systems = by_question.shape[:2]
    counts = generator.multinomial(questions, np.full(questions, 1 / questions), size=resamples)
    drawn = (counts.astype(np.float64) @ by_question.reshape(questions, -1)).reshape(-1, systems, systems)
    drawn = drawn[_is_connected(drawn)]
    if not len(drawn):
        raise DataError(
            f"{questions} questions are too few for an interval: no resample connects all systems",
            "use --rating elo, or collect more judgments",
        )
    point = _estimate(wins[None])[0]
    low, high = np.percentile(_estimate(drawn), [2.5, 97.5], axis=0)
    ranked = _ranked(matches, point, low, high, None)
    return Ratings("bt", ranked, None, len(drawn), resamples - len(drawn))


def estimate_by_bradley_terry(judgments: Sequence[Judgment]) -> dict[str, float]:
    """The ratings of ``rate_by_bradley_terry`` by system, without intervals; none where no finite ones exist.

    Raises DataError when no verdict was parsed.
    """
    matches = _Matches.of(judgments)
    wins = matches.wins_by_question().sum(axis=0)[None]
    if not _is_connected(wins)[0]:
        return {}
    return dict(zip(matches.systems, map(float, _estimate(wins)[0]), strict=True))


@dataclass(frozen=True)
class _Matches:
    """Parsed judgments as arrays of length N; systems and questions by their place in the sorted names."""

    systems: list[str]
    questions: int
    question: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    points: Floats
    """Of the first: 1, 0.5 or 0."""

    @classmethod
    def of(cls, judgments: Sequence[Judgment]) -> _Matches:
        parsed = [judgment for judgment in judgments if judgment.verdict != "unparsed"]
        if not parsed:
            raise DataError(
                f"none of the {len(judgments)} verdicts was parsed",
                "import judgments with verdicts 1, 2 or 3",
            )
        systems = sorted({name for judgment in parsed for name in (judgment.first, judgment.second)})
        questions = sorted({judgment.question for judgment in parsed})
        place = {name: index for index, name in enumerate(systems)}
        asked = {name: index for index, name in enumerate(questions)}
        points = {"first": 1.0, "second": 0.0, "tie": 0.5}
        return cls(
            systems,
            len(questions),
            np.array([asked[judgment.question] for judgment in parsed]),
            np.array([place[judgment.first] for judgment in parsed]),
            np.array([place[judgment.second] for judgment in parsed]),
            np.array([points[judgment.verdict] for judgment in parsed]),
        )

    def wins_by_question(self) -> Floats:
        """Wins of the row's system over the column's, ties as halves: (questions, systems, systems)."""
        wins = np.zeros((self.questions, len(self.systems), len(self.systems)))
        np.add.at(wins, (self.question, self.first, self.second), self.points)
        np.add.at(wins, (self.question, self.second, self.first), 1 - self.points)
        return wins

    def count(self, system: int, points: float) -> int:
        """Matches in which ``system`` got so many points."""
        as_first = (self.first == system) & (self.points == points)
        as_second = (self.second == system) & (self.points == 1 - points)
        return int(as_first.sum() + as_second.sum())


def _play(matches: _Matches, k: float, orderings: int, generator: np.random.Generator) -> Floats:
    """Ratings after all matches, (systems, orderings), each column in an order of its own."""
    count = len(matches.points)
    columns = np.arange(orderings)
    orders = np.tile(np.arange(count, dtype=np.int32), (orderings, 1))
    orders = np.ascontiguousarray(generator.permuted(orders, axis=1).T)  # (matches, orderings)
    ratings = np.full(len(matches.systems) * orderings, START)
    first, second = matches.first * orderings, matches.second * orderings
    for match in orders:
        one, other = first[match] + columns, second[match] + columns
        lead = ratings[one] - ratings[other]
        gain = k * (matches.points[match] - 1 / (1 + 10 ** (-lead / SCALE)))
        ratings[one] += gain
        ratings[other] -= gain
    return ratings.reshape(-1, orderings)


def _estimate(wins: Floats) -> Floats:
    """Maximum-likelihood ratings, (batch, systems), for connected ``wins``, (batch, systems, systems)."""
    matches = wins + wins.transpose(0, 2, 1)
    won = wins.sum(axis=2)
    strength = np.ones_like(won)
    for _ in range(_MAX_STEPS):
        shares = matches / (strength[:, :, None] + strength[:, None, :])
        new = won / shares.sum(axis=2)
        new /= np.exp(np.log(new).mean(axis=1, keepdims=True))
        moved = np.abs(np.log(new / strength)).max()
        strength = new
        if moved < _TOLERANCE:
            ratings: Floats = START + SCALE * np.log10(strength)
            return ratings
    raise DataError(
        "the Bradley-Terry ratings do not settle: some systems are connected by very few judgments",
        "use --rating elo, or collect more judgments",
    )


def _is_connected(wins: Floats) -> NDArray[np.bool_]:
    """For each of (batch, systems, systems): whether paths of wins lead from every system to every other."""
    systems = wins.shape[1]
    reach: Any = (wins > 0) | np.eye(systems, dtype=bool)
    for _ in range(systems.bit_length()):  # each squaring doubles the length of the paths
        paths = reach.astype(np.float64)
        reach = paths @ paths > 0
    connected: NDArray[np.bool_] = reach.all(axis=(1, 2))
    return connected


def _ranked(matches: _Matches, rating: Any, low: Any, high: Any, error: Any) -> tuple[Rating, ...]:
    """The systems by their rating, best first, then by name."""
    order = sorted(range(len(matches.systems)), key=lambda at: (-rating[at], matches.systems[at]))
    return tuple(
        Rating(
            system=matches.systems[at],
            rank=rank,
            rating=float(rating[at]),
            interval=(float(low[at]), float(high[at])),
            mean_error=None if error is None else float(error[at]),
            wins=matches.count(at, 1.0),
            ties=matches.count(at, 0.5),
            losses=matches.count(at, 0.0),
        )
        for rank, at in enumerate(order, 1)
    )
