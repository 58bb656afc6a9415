"""One split's rows as they are written: counted, hashed, and searched."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from adapterhub.packaging.dataset.duplicates import DuplicateSearch
from adapterhub.packaging.dataset.evidence import SplitEvidence
from adapterhub.packaging.dataset.inputs import InputRow
from adapterhub.packaging.dataset.lengths import LengthCount, TokenCounter
from adapterhub.packaging.dataset.overlap import Overlaps
from adapterhub.packaging.dataset.personal import PersonalDataSearch
from adapterhub.packaging.dataset.words import split_words
from adapterhub.packaging.rows import canonical
from adapterhub.packaging.splits import Split

if TYPE_CHECKING:
    import pyarrow


class SplitCount:
    """Everything that is known of one split when its last row has passed."""

    def __init__(
        self,
        split: Split,
        counter: TokenCounter | None,
        duplicates: DuplicateSearch,
        personal: PersonalDataSearch,
        overlaps: Overlaps,
    ) -> None:
        self.split = split
        self.rows = 0
        self._messages = 0
        self._bytes = 0
        self._content = sha256()
        self._trained_on = sha256()
        self._lengths = LengthCount(counter)
        self._duplicates, self._personal, self._overlaps = duplicates, personal, overlaps

    def add(self, rows: Sequence[InputRow], table: pyarrow.Table) -> None:
        """The next rows, and the same as they are stored."""
        for stored in table.to_pylist():
            line = canonical(without_nulls(stored))
            self._content.update(line)
            self._bytes += len(line)
        for row in rows:
            self._trained_on.update(row.said)
        texts = [[message["content"] for message in row.messages] for row in rows]
        self._messages += sum(len(row) for row in texts)
        words = [[split_words(text) for text in row] for row in texts]
        self._lengths.add(texts, [sum(len(text) for text in row) for row in words])
        self._duplicates.add(self.split, [row.said for row in rows])
        self._personal.add(self.split, self.rows, texts)
        if self.split == "train":
            self._overlaps.add_train([spoken(row, said) for row, said in zip(rows, words, strict=True)])
        self.rows += len(rows)

    @property
    def rows_sha256(self) -> str:
        """The digest of the rows that a training run notes: see ``adapterhub.trainer.data.rows_digest``."""
        return self._trained_on.hexdigest()

    def finish(self) -> SplitEvidence:
        return SplitEvidence(
            split=self.split,
            rows=self.rows,
            messages=self._messages,
            bytes=self._bytes,
            content_sha256=self._content.hexdigest(),
            lengths=self._lengths.finish(),
        )


def spoken_words(row: InputRow) -> list[str]:
    """The words of user and assistant."""
    return spoken(row, [split_words(message["content"]) for message in row.messages])


def spoken(row: InputRow, words: Sequence[list[str]]) -> list[str]:
    """The ``words`` of each message, less the system's: a system message that rows share is no leak."""
    pairs = zip(row.messages, words, strict=True)
    return [word for message, said in pairs if message["role"] != "system" for word in said]


def without_nulls(value: Any) -> Any:
    """``value`` less the keys that hold null: parquet cannot tell them from absent ones."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
