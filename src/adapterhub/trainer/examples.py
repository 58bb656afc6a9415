"""Rows as tokens: which of them fit into the context, and what one pass over them comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub.errors import DataError
from adapterhub.packaging.splits import Split
from adapterhub.trainer.arguments import steps_of
from adapterhub.trainer.data import Row
from adapterhub.trainer.packing import pack
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.template import Encoded, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examples:
    """Rows that are trained on, and those that are too long."""

    rows: list[Row]
    encoded: list[Encoded]
    """Of each of ``rows``."""
    too_long: list[tuple[str, int]]
    """Where each of the others stands, and its length in tokens."""


@dataclass(frozen=True)
class RunSize:
    """What training on some rows comes to."""

    lengths: tuple[int, ...]
    """Tokens of each row, those left out among them."""
    left_out: int
    """Rows longer than ``data.max_length``."""
    packed_rows: int
    """What the others are packed into."""
    tokens: int
    """In them all, padding left out."""
    steps: int
    """Optimizer steps of the whole run."""

    def left_out_at(self, max_length: int) -> int:
        """Rows that another ``data.max_length`` would leave out."""
        return sum(length > max_length for length in self.lengths)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int, split: Split
) -> Examples:
    """Rows to tokens by the tokenizer's chat template.

    Raises DataError naming a row that the template cannot take, or when all are longer than ``max_length``.
    """
    kept, encoded, too_long = [], [], []
    for row in rows:
        try:
            example = encode(tokenizer, row.messages)
        except DataError as err:
            raise DataError(f"{row.where}: {err.what}", err.fix) from err
        if len(example.input_ids) > max_length:
            too_long.append((row.where, len(example.input_ids)))
        else:
            kept.append(row)
            encoded.append(example)
    if not encoded:
        raise DataError(
            f"all {len(rows)} {split} rows are longer than data.max_length {max_length}",
            "raise data.max_length, or shorten the rows",
        )
    return Examples(kept, encoded, too_long)


def size_of_run(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Row]) -> RunSize:
    """What training ``recipe`` on ``rows`` comes to. Raises DataError as ``encode_rows`` does."""
    length = recipe.data.max_length
    examples = encode_rows(tokenizer, rows, length, "train")
    packed = pack(examples.encoded, length, seed=recipe.training.seed, packing=recipe.data.packing)
    kept = [len(example.input_ids) for example in examples.encoded]
    return RunSize(
        lengths=(*kept, *(long for _, long in examples.too_long)),
        left_out=len(examples.too_long),
        packed_rows=len(packed),
        tokens=sum(kept),
        steps=steps_of(recipe, len(packed)),
    )
