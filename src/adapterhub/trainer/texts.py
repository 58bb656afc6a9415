"""Text to measure and calibrate with, as tokens: rows by the chat template, or plain text in windows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import DataError
from adapterhub.trainer.data import read_rows
from adapterhub.trainer.template import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 512
"""Tokens that a text may have: plain text is cut there, and a longer conversation ends there."""
_ROWS = (".jsonl", ".json", ".parquet")


def read_texts(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None
) -> list[list[int]]:
    """The token ids of each text in ``path``, 2 to ``WINDOW`` of them.

    A ``.jsonl``, ``.json`` or ``.parquet`` file holds rows in the forms that training takes; any other is
    plain text in UTF-8. ``limit`` takes that many rows, or windows, from the top. Raises DataError when the
    file is missing or holds nothing usable, RecipeError when rows need a chat template and there is none.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", "check the path of the text")
    if path.suffix in _ROWS:
        rows = read_rows(path, "test")[:limit]
        texts = [encode(tokenizer, row.messages).input_ids[:WINDOW] for row in rows]
    else:
        texts = _windows(path, tokenizer)[:limit]
    texts = [text for text in texts if len(text) >= 2]
    if not texts:
        raise DataError(f"{path} holds no text of two tokens", "name a file with text in it")
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
