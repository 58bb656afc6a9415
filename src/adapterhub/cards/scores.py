"""Scores of the base beside the adapter, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adapterhub.cards.generation import Answer
from adapterhub.cards.losses import RowLoss
from adapterhub.cards.questions import Question
from adapterhub.packaging.evidence import Score

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % point."""


def is_exact(answer: str, reference: str) -> bool:
    """Whether ``answer`` is ``reference`` but for white space around it."""
    return answer.strip() == reference.strip()


def wilson_interval(hits: int, rows: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, JASA 1927); ``rows`` is at least 1."""
    share = hits / rows
    spread = Z_95**2 / rows
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    # Exactly 0 and 1 at the ends: rounding must not leave the unit interval or the share outside.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def loss_interval(losses: Sequence[RowLoss]) -> tuple[float, float] | None:
    """The 95 % interval of the mean loss a token, with rows as clusters, since a row's tokens hang together.

    The ratio estimator's variance (Cochran, Sampling Techniques, section 6.4) and the normal approximation;
    None for fewer than two rows.
    """
    rows = len(losses)
    if rows < 2:
        return None
    tokens = sum(loss.tokens for loss in losses)
    mean = sum(loss.nats for loss in losses) / tokens
    residuals = sum((loss.nats - mean * loss.tokens) ** 2 for loss in losses)
    half = Z_95 * math.sqrt(rows / (rows - 1) * residuals) / tokens
    return max(0.0, mean - half), mean + half


def score_exact_match(
    questions: Sequence[Question], base: Sequence[Answer], adapter: Sequence[Answer]
) -> Score:
    """The share of questions that each side answers exactly, with Wilson intervals."""
    rows = len(questions)
    base_hits, adapter_hits = (
        sum(
            is_exact(answer.text, question.reference)
            for question, answer in zip(questions, side, strict=True)
        )
        for side in (base, adapter)
    )
    return Score(
        metric="exact_match",
        unit="share of rows",
        rows=rows,
        base=base_hits / rows,
        adapter=adapter_hits / rows,
        base_interval=wilson_interval(base_hits, rows),
        adapter_interval=wilson_interval(adapter_hits, rows),
    )


def score_loss(base: Sequence[RowLoss], adapter: Sequence[RowLoss]) -> Score:
    """The mean loss over all assistant tokens on each side, in nats a token."""
    tokens = sum(loss.tokens for loss in adapter)
    return Score(
        metric="loss",
        unit="nats a token",
        rows=len(adapter),
        base=sum(loss.nats for loss in base) / tokens,
        adapter=sum(loss.nats for loss in adapter) / tokens,
        base_interval=loss_interval(base),
        adapter_interval=loss_interval(adapter),
        tokens=tokens,
    )
