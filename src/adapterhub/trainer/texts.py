"""Text to measure and calibrate with, as tokens: rows by the chat template, or plain text in windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import DataError
from adapterhub.trainer.data import read_rows
from adapterhub.trainer.template import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 512
"""Tokens that a text may have: plain text is cut there, and a longer conversation ends there."""
CALIBRATED, MEASURED = 128, 60
"""Texts that 4-bit codes are chosen on, and texts that the result is measured on."""
_ROWS = (".jsonl", ".json", ".parquet")
# Of a file that both are taken from, this share is measured on: the last part.
_MEASURED_SHARE = 0.25


def read_texts(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None
) -> list[list[int]]:
    """The token ids of each text in ``path``, 2 to ``WINDOW`` of them.

    A ``.jsonl``, ``.json`` or ``.parquet`` file holds rows in the forms that training takes; any other is
    plain text in UTF-8. ``limit`` takes that many rows, or windows, from the top. Raises DataError when the
    file is missing or holds nothing usable, RecipeError when rows need a chat template and there is none.
    """
    whole = _Texts(path, tokenizer)
    return whole.encode(range(whole.count)[:limit])


@dataclass(frozen=True)
class SplitTexts:
    """Texts of one file for two purposes, none for both."""

    calibration: list[list[int]]
    """Token ids of at most ``CALIBRATED`` texts from all over the first part of the file."""
    held_out: list[list[int]]
    """Token ids of at most ``MEASURED`` texts, those at its end."""
    skipped: int
    """Texts before the held-out ones."""


def split_texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> SplitTexts:
    """Texts of ``path`` to choose codes on and others to measure with; raises as ``read_texts`` does.

    DataError too when there are too few for both.
    """
    whole = _Texts(path, tokenizer)
    measured = min(MEASURED, int(whole.count * _MEASURED_SHARE))
    if measured == 0:
        raise DataError(
            f"{path} holds {whole.count} texts, too few to choose codes on some and measure on others",
            "name a longer text, or other text to measure with: --held-out FILE",
        )
    first = whole.count - measured
    return SplitTexts(
        whole.encode(_spread(first, CALIBRATED)), whole.encode(range(first, whole.count)), first
    )


def sample_texts(path: Path, tokenizer: PreTrainedTokenizerBase, limit: int = CALIBRATED) -> list[list[int]]:
    """Token ids of at most ``limit`` texts from all over ``path``; raises as ``read_texts`` does."""
    whole = _Texts(path, tokenizer)
    return whole.encode(_spread(whole.count, limit))


def _spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the first ``count`` numbers, evenly apart."""
    return (
        sorted({number * count // wanted for number in range(wanted)})
        if count > wanted
        else list(range(count))
    )


class _Texts:
    """The texts of one file; those that are asked for are encoded."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        if not path.is_file():
            raise DataError(f"{path}: no such file", "check the path of the text")
        self._path = path
        self._get: Callable[[int], list[int]]
        if path.suffix in _ROWS:
            rows = read_rows(path, "test")
            self.count = len(rows)
            self._get = lambda number: encode(tokenizer, rows[number].messages).input_ids[:WINDOW]
        else:
            windows = _windows(path, tokenizer)
            self.count = len(windows)
            self._get = windows.__getitem__

    def encode(self, numbers: Sequence[int]) -> list[list[int]]:
        """The token ids of those texts; raises DataError when none has two tokens."""
        texts = [text for text in map(self._get, numbers) if len(text) >= 2]
        if not texts:
            raise DataError(f"{self._path} holds no text of two tokens", "name a file with text in it")
        return texts


def _windows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError(
            f"{path} is not UTF-8 text: {err.reason}", "name plain text, or rows in .jsonl"
        ) from err
    ids = tokenizer(text, verbose=False)["input_ids"]
    return [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
