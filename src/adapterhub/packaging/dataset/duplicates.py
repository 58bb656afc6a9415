"""Rows that say the same, found on the disk: memory stays bounded however many rows there are."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adapterhub.packaging.dataset.bits import Spool
from adapterhub.packaging.dataset.evidence import Duplicates
from adapterhub.packaging.splits import Split

_SPLITS: Final[tuple[Split, ...]] = ("train", "test")
_EXAMPLES: Final = 5


class DuplicateSearch:
    """Notes each row's messages by a hash of 128 bits."""

    def __init__(self, folder: Path) -> None:
        self._spool = Spool(folder, [("more", np.uint64), ("split", np.uint8), ("row", np.uint64)])
        self._rows = dict.fromkeys(_SPLITS, 0)

    def add(self, split: Split, rows: Sequence[bytes]) -> None:
        """The next rows of a split, each as its messages in canonical JSON."""
        digests = b"".join(blake2b(row, digest_size=16).digest() for row in rows)
        halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
        numbers = np.arange(self._rows[split], self._rows[split] + len(rows), dtype=np.uint64)
        self._spool.add(halves[:, 0], more=halves[:, 1], split=_SPLITS.index(split), row=numbers)
        self._rows[split] += len(rows)

    def finish(self) -> Duplicates:
        repeated = dict.fromkeys(_SPLITS, 0)
        examples: list[tuple[int, int]] = []
        shared = 0
        for records in self._spool.buckets():
            records = records[
                np.lexsort((records["row"], records["split"], records["more"], records["hash"]))
            ]
            again = _equal_to_last(records, "hash", "more", "split")
            for index, split in enumerate(_SPLITS):
                ours = records[again & (records["split"] == index)]
                repeated[split] += len(ours)
                examples += [(index, int(row)) for row in np.sort(ours["row"])[:_EXAMPLES]]
            shared += _count_test_in_train(records)
        return Duplicates(
            repeated={split: repeated[split] for split in _SPLITS if self._rows[split]},
            test_in_train=shared,
            examples=tuple(f"{_SPLITS[index]} row {row + 1}" for index, row in sorted(examples)[:_EXAMPLES]),
        )

    def close(self) -> None:
        """Let go of the files; their folder may then be removed."""
        self._spool.close()


def _equal_to_last(records: NDArray[Any], *names: str) -> NDArray[np.bool_]:
    """Of each record, whether it equals the one before it in these fields."""
    again = np.zeros(len(records), dtype=bool)
    if len(records) > 1:
        again[1:] = np.logical_and.reduce([records[name][1:] == records[name][:-1] for name in names])
    return again


def _count_test_in_train(records: NDArray[Any]) -> int:
    """Test rows with a train row of the same hash; ``records`` are sorted by hash, train before test."""
    groups = np.cumsum(~_equal_to_last(records, "hash", "more"))
    in_train = np.unique(groups[records["split"] == 0])
    return int(np.isin(groups[records["split"] == 1], in_train).sum())
