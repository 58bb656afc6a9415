"""Scores of the base beside the adapter, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adapterhub.cards.generation import Answer
from adapterhub.cards.losses import RowLoss
from adapterhub.cards.questions import Question

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


def tell_exact(questions: Sequence[Question], answers: Sequence[Answer]) -> list[bool]:
    """Whether each question is answered exactly."""
    return [
        is_exact(answer.text, question.reference) for question, answer in zip(questions, answers, strict=True)
    ]


def mean_loss(losses: Sequence[RowLoss]) -> float:
    """Nats a token over all assistant tokens."""
    return sum(loss.nats for loss in losses) / sum(loss.tokens for loss in losses)


def bits_per_nat(questions: Sequence[Question], losses: Sequence[RowLoss]) -> float:
    """What turns a mean loss (nats a token) into bits a byte of the assistant's text in UTF-8.

    The loss of end tokens, which have no bytes, is in it.
    """
    return sum(loss.tokens for loss in losses) / text_bytes(questions) / math.log(2)


def text_bytes(questions: Sequence[Question]) -> int:
    """UTF-8 bytes of everything the assistant says in these rows, earlier turns too."""
    return sum(
        len(text.encode())
        for question in questions
        for text in (
            *(m["content"] for m in question.messages if m["role"] == "assistant"),
            question.reference,
        )
    )
