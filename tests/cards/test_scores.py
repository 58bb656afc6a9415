"""Intervals and exact match."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.cards.losses import RowLoss
from adapterhub.cards.scores import is_exact, loss_interval, mean_loss, wilson_interval


@pytest.mark.parametrize(
    ("hits", "rows", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17:857-872), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_gives_the_published_values(hits: int, rows: int, low: float, high: float) -> None:
    assert wilson_interval(hits, rows) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows))))
def test_wilson_interval_holds_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    hits, rows = counts
    low, high = wilson_interval(hits, rows)
    assert 0 <= low <= hits / rows <= high <= 1
    assert high - low > 0
    mirrored = wilson_interval(rows - hits, rows)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


def test_loss_is_a_mean_over_tokens_not_over_rows() -> None:
    losses = [RowLoss(nats=10.0, tokens=1), RowLoss(nats=9.0, tokens=9)]
    interval = loss_interval(losses)
    assert mean_loss(losses) == 1.9
    assert interval is not None
    assert interval[0] < 1.9 < interval[1]


def test_loss_interval_is_none_for_one_row_and_narrows_with_rows() -> None:
    rows = [RowLoss(nats=2.0, tokens=4), RowLoss(nats=6.0, tokens=4)]
    assert loss_interval(rows[:1]) is None
    few, many = loss_interval(rows), loss_interval(rows * 50)
    assert few is not None
    assert many is not None
    assert many[1] - many[0] < (few[1] - few[0]) / 5
    # Equal row lengths: the ratio estimator is the plain standard error of the row means.
    assert many[1] - many[0] == pytest.approx(2 * 1.959964 * (0.5 * (100 / 99) ** 0.5) / 10, rel=1e-6)


def test_exact_match_ignores_only_white_space_around() -> None:
    assert is_exact(' {"a": 1}\n', '{"a": 1}')
    assert not is_exact('{"a":1}', '{"a": 1}')
    assert not is_exact("paris", "Paris")
