"""Held-out loss: how surprised a model is by the assistant's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub.cards.generation import Report
from adapterhub.cards.questions import IGNORED, Question

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

# Padded tokens that go through the model at once; bounds the logits (tokens x vocabulary) at some hundred MB.
_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class RowLoss:
    """The loss of one row."""

    nats: float
    """Sum of the negative log-likelihoods of its assistant tokens."""
    tokens: int
    """How many those are."""


def measure_losses(
    model: PeftModel | PreTrainedModel, questions: Sequence[Question], report: Report
) -> list[RowLoss]:
    """Each row's loss over its assistant tokens, in the questions' order; log-softmax in fp32."""
    losses: dict[int, RowLoss] = {}
    for batch in _batches(questions):
        for index, loss in zip(batch, _batch_losses(model, [questions[i] for i in batch]), strict=True):
            losses[index] = loss
        report(len(losses), len(questions))
    return [losses[index] for index in range(len(questions))]


def _batches(questions: Sequence[Question]) -> list[list[int]]:
    """Indices in batches of like length, longest first: ``_TOKENS_AT_ONCE`` padded tokens, or one row."""
    order = sorted(range(len(questions)), key=lambda index: (-len(questions[index].input_ids), index))
    result: list[list[int]] = []
    for index in order:
        if result and (len(result[-1]) + 1) * len(questions[result[-1][0]].input_ids) <= _TOKENS_AT_ONCE:
            result[-1].append(index)
        else:
            result.append([index])
    return result


def _batch_losses(model: PeftModel | PreTrainedModel, rows: Sequence[Question]) -> list[RowLoss]:
    import torch

    width = max(len(row.input_ids) for row in rows)
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [IGNORED] * (width - len(row.labels)) for row in rows])[:, 1:]
    mask = torch.arange(width)[None, :] < lengths[:, None]
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device), use_cache=False
        ).logits[:, :-1]
        spoken = labels != IGNORED  # (rows, width - 1)
        picked = logits[spoken.to(logits.device)].float()  # (assistant tokens, vocabulary)
        nats = torch.nn.functional.cross_entropy(
            picked, labels[spoken].to(logits.device), reduction="none"
        ).cpu()
    counts = spoken.sum(dim=1).tolist()
    return [
        RowLoss(float(part.double().sum()), count)
        for part, count in zip(torch.split(nats, counts), counts, strict=True)
    ]
