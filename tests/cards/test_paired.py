"""Paired tests against published values and against their definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.cards.losses import RowLoss
from adapterhub.cards.paired import count_discordant, find, find_in_losses, holm, loss_difference, mcnemar


@pytest.mark.parametrize(
    # Twice the binomial tails, by hand: 2 * (1 + 10) / 2**10, 2 * 1 / 2**6, and two ties.
    ("gained", "lost", "p_value"),
    [(1, 9, 22 / 1024), (6, 0, 2 / 64), (5, 5, 1.0), (0, 0, 1.0)],
)
def test_mcnemar_is_the_exact_two_sided_test(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p_value)


def test_holm_gives_the_textbook_example() -> None:
    # Holm 1979: sorted p times 4, 3, 2, 1, never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(value <= after <= 1 for value, after in zip(values, adjusted, strict=True))
    pairs = sorted(zip(values, adjusted, strict=True))
    assert [after for _, after in pairs] == sorted(adjusted)


def test_noise_is_not_called_a_gain() -> None:
    before = [True] * 10 + [False] * 10
    after = [True] * 9 + [False] + [True] * 4 + [False] * 6
    gained, lost = count_discordant(before, after)
    assert (gained, lost) == (4, 1)
    assert find(gained, lost, mcnemar(gained, lost)) == "no difference shown"
    assert find(10, 0, mcnemar(10, 0)) == "better"
    assert find(0, 10, mcnemar(0, 10)) == "worse"


def test_a_difference_in_loss_pairs_rows() -> None:
    """Rows differ much, the two models little and always alike: only a paired interval shows it."""
    base = [RowLoss(nats=float(nats), tokens=4) for nats in (1, 9, 30, 4, 16, 2)]
    better = [RowLoss(loss.nats - 0.4 + 0.01 * at, loss.tokens) for at, loss in enumerate(base)]
    mean, interval = loss_difference(better, base)
    assert mean == pytest.approx((-6 * 0.4 + 0.15) / 24)
    assert find_in_losses(interval) == "better"
    assert find_in_losses(loss_difference(base, better)[1]) == "worse"
    assert find_in_losses(loss_difference(base, base)[1]) == "no difference shown"
    assert loss_difference(base[:1], better[:1])[1] is None
    assert find_in_losses(None) is None
