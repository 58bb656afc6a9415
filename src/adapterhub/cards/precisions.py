"""The base in 16 bits, quantized, and with the adapter, on the same rows: what each step cost or bought."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub.cards.evaluation import Measured
from adapterhub.cards.paired import count_discordant, find, find_in_losses, loss_difference, mcnemar
from adapterhub.cards.questions import Question
from adapterhub.cards.scores import (
    bits_per_nat,
    loss_interval,
    mean_loss,
    tell_exact,
    text_bytes,
    wilson_interval,
)
from adapterhub.packaging.evidence import ScoresEvidence
from adapterhub.packaging.precisions import PrecisionsEvidence, Side, SideDifference, SideFigures


@dataclass(frozen=True)
class _Figures:
    """One side, question by question."""

    side: Side
    measured: Measured
    right: list[bool]


def compare_precisions(
    questions: Sequence[Question],
    sixteen: Measured,
    quantized: Measured,
    adapter: Measured,
    *,
    scores: ScoresEvidence,
    quantization: str,
    seconds: float,
) -> PrecisionsEvidence:
    """Three measurements of the same questions as evidence.

    ``scores`` are those of the last two, for what was measured where; ``quantization`` is in words, and
    ``seconds`` is the wall time of all three.
    """
    measured: dict[Side, Measured] = {
        "base_16_bit": sixteen,
        "base_quantized": quantized,
        "adapter": adapter,
    }
    first, second, third = (
        _Figures(side, it, tell_exact(questions, it.answers)) for side, it in measured.items()
    )
    return PrecisionsEvidence(
        adapter_sha256=scores.adapter_sha256,
        quantization=quantization,
        data=scores.data,
        rows=len(questions),
        tokens=sum(loss.tokens for loss in adapter.losses),
        text_bytes=text_bytes(questions),
        sides=(_figures(first, questions), _figures(second, questions), _figures(third, questions)),
        cost=_subtract(second, first),
        bought=_subtract(third, second),
        net=_subtract(third, first),
        decoding=dict[str, Any](scores.decoding),
        limit=scores.limit,
        left_out=scores.left_out,
        base_mismatch=scores.base_mismatch,
        tools=scores.tools,
        hardware=scores.hardware,
        seconds=seconds,
    )


def _figures(side: _Figures, questions: Sequence[Question]) -> SideFigures:
    losses, rows, exact = side.measured.losses, len(side.right), sum(side.right)
    loss = mean_loss(losses)
    return SideFigures(
        side=side.side,
        exact=exact,
        exact_match=exact / rows,
        exact_match_interval=wilson_interval(exact, rows),
        loss=loss,
        loss_interval=loss_interval(losses),
        perplexity=math.exp(loss),
        bits_per_byte=loss * bits_per_nat(questions, losses),
    )


def _subtract(of: _Figures, minus: _Figures) -> SideDifference:
    gained, lost = count_discordant(minus.right, of.right)
    p_value = mcnemar(gained, lost)
    loss, interval = loss_difference(of.measured.losses, minus.measured.losses)
    return SideDifference(
        of=of.side,
        minus=minus.side,
        loss=loss,
        loss_interval=interval,
        loss_verdict=find_in_losses(interval),
        exact_match=(gained - lost) / len(of.right),
        exact_match_p_value=p_value,
        exact_match_verdict=find(gained, lost, p_value),
    )
