"""Examples into rows and rows into batches, so that no example sees another and no pad token is learned."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub.trainer.template import IGNORED, Encoded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackedRow:
    """Several examples, one after the other."""

    input_ids: list[int]
    """Length T, at most the recipe's max_length."""
    labels: list[int]
    """Length T."""
    position_ids: list[int]
    """Length T; begins again at 0 with each example, which is how attention knows where one ends."""


def pack(examples: Sequence[Encoded], max_length: int, *, seed: int, packing: bool = True) -> list[PackedRow]:
    """Shuffle examples by ``seed`` and put them into rows of at most ``max_length`` tokens.

    Best fit: each example goes into the open row that it fills most; so no order by length is left in the
    data. Without ``packing`` each example is a row of its own. Every example must fit: leave longer ones out
    before.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    if not packing:
        return [_row([examples[index]]) for index in order]
    rows: list[list[Encoded]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in order:
        example = examples[index]
        length = len(example.input_ids)
        at = bisect.bisect_left(open_rows, (length, -1))
        if at < len(open_rows):
            free, row = open_rows.pop(at)
            rows[row].append(example)
        else:
            free, row = max_length, len(rows)
            rows.append([example])
        bisect.insort(open_rows, (free - length, row))
    return [_row(members) for members in rows]


def collate(rows: Sequence[PackedRow], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows to one batch: ``input_ids``, ``labels`` and ``position_ids``, each int64 of shape (rows, longest).

    Padding is marked by position, not by token id: it is a sequence of its own at the row's end, carries no
    loss, and no example attends to it. So a pad token that is the end token as well (as in SmolLM2) hides no
    end token.
    """
    import torch

    longest = max(len(row.input_ids) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        missing = longest - len(row.input_ids)
        batch["input_ids"].append(row.input_ids + [pad_token_id] * missing)
        batch["labels"].append(row.labels + [IGNORED] * missing)
        batch["position_ids"].append(row.position_ids + list(range(missing)))
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in batch.items()}


def _row(examples: Sequence[Encoded]) -> PackedRow:
    return PackedRow(
        input_ids=[token for example in examples for token in example.input_ids],
        labels=[label for example in examples for label in example.labels],
        position_ids=[position for example in examples for position in range(len(example.input_ids))],
    )
