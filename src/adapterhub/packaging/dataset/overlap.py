"""Sequences of 13 words that train rows share with texts that a model is tested on, in bounded memory.

First every sequence of the tests is noted: its hash on the disk, and one bit in a filter of fixed size. Then
train rows go by; what passes the filter goes to the disk too. At the end both are joined, a part of the
hashes at a time, so that what the filter let through by chance drops out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adapterhub.errors import DataError
from adapterhub.packaging.dataset.bits import Bits, Spool
from adapterhub.packaging.dataset.evidence import Overlap
from adapterhub.packaging.dataset.words import SEQUENCE, hash_sequences, split_words
from adapterhub.packaging.files import sha256_file
from adapterhub.packaging.rowfiles import read_entries
from adapterhub.packaging.splits import DATA_SUFFIXES

_FILTER_BITS: Final = 1 << 28  # 32 MiB
_TEXTS_AT_ONCE: Final = 1024
_EXAMPLES: Final = 5


@dataclass
class _Reference:
    """One body of texts to test with."""

    name: str
    sha256: str | None
    texts: int = 0
    short: int = 0


class Overlaps:
    """Counts sequences shared by the train split with the test split and with benchmarks."""

    def __init__(self, folder: Path) -> None:
        self._filter = Bits(_FILTER_BITS)
        self._tests = Spool(folder / "tests", [("reference", np.uint16), ("text", np.uint64)])
        self._train = Spool(folder / "train", [("row", np.uint64)])
        self._references: list[_Reference] = []
        self._train_rows = 0

    def add_benchmark(self, name: str, path: Path) -> None:
        """Note a benchmark: a file of rows, of which every text counts, or a plain text, line by line.

        Raises DataError when it cannot be read or holds nothing.
        """
        if not path.is_file():
            raise DataError(f"{path}: no such file", "check the path of the benchmark")
        reference = self._new_reference(name, sha256_file(path))
        texts: list[list[str]] = []
        for words in _benchmark_texts(path):
            texts.append(words)
            if len(texts) >= _TEXTS_AT_ONCE:
                self._note(reference, texts)
                texts = []
        self._note(reference, texts)
        if not reference.texts:
            raise DataError(f"{path} holds no text", "name a benchmark's file with rows or lines in it")

    def add_test(self, rows: Sequence[list[str]]) -> None:
        """Note rows of the test split, each as its words."""
        known = [it for it in self._references if it.sha256 is None]
        self._note(known[0] if known else self._new_reference("test", None), rows)

    def add_train(self, rows: Sequence[list[str]]) -> None:
        """Compare the next rows of the train split, each as its words; all tests are noted by now."""
        if self._references:
            hashes, owners = hash_sequences(rows)
            passed = self._filter.holds(_positions(hashes))
            self._train.add(hashes[passed], row=(owners[passed] + self._train_rows).astype(np.uint64))
        self._train_rows += len(rows)

    def finish(self) -> tuple[Overlap, ...]:
        """What was found, a record for each body of tests in the order they were noted."""
        found = [Bits(max(it.texts, 1)) for it in self._references]
        hit = [Bits(max(self._train_rows, 1)) for _ in self._references]
        for test_bucket, train_bucket in zip(self._tests.buckets(), self._train.buckets(), strict=True):
            for tests in test_bucket:
                for train in train_bucket:
                    _join(tests, train, found, hit)
        return tuple(
            Overlap(
                name=it.name,
                sha256=it.sha256,
                texts=it.texts,
                short=it.short,
                found=texts.count(),
                train_rows=rows.count(),
                examples=tuple(f"row {number + 1}" for number in texts.first(_EXAMPLES)),
            )
            for it, texts, rows in zip(self._references, found, hit, strict=True)
        )

    def close(self) -> None:
        """Let go of the files; their folder may then be removed."""
        self._tests.close()
        self._train.close()

    def _new_reference(self, name: str, digest: str | None) -> _Reference:
        self._references.append(_Reference(name, digest))
        return self._references[-1]

    def _note(self, reference: _Reference, texts: Sequence[list[str]]) -> None:
        hashes, owners = hash_sequences(texts)
        self._filter.add(_positions(hashes))
        numbers = (owners + reference.texts).astype(np.uint64)
        self._tests.add(hashes, reference=self._references.index(reference), text=numbers)
        reference.texts += len(texts)
        reference.short += sum(len(words) < SEQUENCE for words in texts)


def _join(tests: NDArray[Any], train: NDArray[Any], found: Sequence[Bits], hit: Sequence[Bits]) -> None:
    """Note, for each body of tests, which of its texts and which train rows share a hash."""
    shared = np.intersect1d(tests["hash"], train["hash"])
    if not len(shared):
        return
    tests = tests[np.isin(tests["hash"], shared)]
    train = train[np.isin(train["hash"], shared)]
    for index in np.unique(tests["reference"]).tolist():
        ours = tests[tests["reference"] == index]
        found[index].add(ours["text"])
        hit[index].add(train["row"][np.isin(train["hash"], ours["hash"])])


def _positions(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return hashes & np.uint64(_FILTER_BITS - 1)


def _benchmark_texts(path: Path) -> Iterator[list[str]]:
    """The words of each row or line."""
    if path.suffix in DATA_SUFFIXES:
        for _, content in read_entries(path):
            yield [word for text in _all_texts(content) for word in split_words(text)]
        return
    try:
        with path.open(encoding="utf-8-sig") as lines:
            yield from (split_words(line) for line in lines if line.strip())
    except UnicodeDecodeError as err:
        raise DataError(
            f"{path} is not UTF-8 text: {err.reason}", "name plain text, or rows in .jsonl"
        ) from err


def _all_texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _all_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _all_texts(item)
