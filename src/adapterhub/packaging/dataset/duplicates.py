"""Rows that say the same, found on the disk: memory stays bounded however many rows there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adapterhub.packaging.dataset.bits import Bucket, Spool
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
        for bucket in self._spool.buckets():
            for number, records in enumerate(bucket):
                for index, split in enumerate(_SPLITS):
                    ours = records[records["split"] == index]
                    again = ours[_repeat(ours, islice(bucket, number), index)]
                    repeated[split] += len(again)
                    examples += [(index, int(row)) for row in np.sort(again["row"])[:_EXAMPLES]]
                examples = sorted(examples)[:_EXAMPLES]
                shared += _count_in_train(records[records["split"] == 1], bucket)
        return Duplicates(
            repeated={split: repeated[split] for split in _SPLITS if self._rows[split]},
            test_in_train=shared,
            examples=tuple(f"{_SPLITS[index]} row {row + 1}" for index, row in examples),
        )

    def close(self) -> None:
        """Let go of the files; their folder may then be removed."""
        self._spool.close()


def _repeat(records: NDArray[Any], earlier: Iterable[NDArray[Any]], split: int) -> NDArray[np.bool_]:
    """Of each record of a split, whether it says what one before it says, here or in ``earlier`` pieces."""
    again = np.ones(len(records), dtype=bool)
    again[np.unique(_groups(records), return_index=True)[1]] = False  # the first of each
    for piece in earlier:
        again |= _stands_in(records, piece[piece["split"] == split])
    return again


def _count_in_train(tests: NDArray[Any], bucket: Bucket) -> int:
    """Test rows that say what a train row says."""
    found = np.zeros(len(tests), dtype=bool)
    if len(tests):
        for piece in bucket:
            found |= _stands_in(tests, piece[piece["split"] == 0])
    return int(found.sum())


def _stands_in(records: NDArray[Any], others: NDArray[Any]) -> NDArray[np.bool_]:
    """Of each record, whether one of the others has its hash."""
    groups = _groups(records, others)
    held = np.zeros(len(groups), dtype=bool)
    held[groups[len(records) :]] = True
    found: NDArray[np.bool_] = held[groups[: len(records)]]
    return found


def _groups(*pieces: NDArray[Any]) -> NDArray[np.intp]:
    """A number for each record, the same for the same 128 bits."""
    hashes, more = (np.concatenate([piece[name] for piece in pieces]) for name in ("hash", "more"))
    order = np.lexsort((more, hashes))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (hashes[order][1:] != hashes[order][:-1]) | (more[order][1:] != more[order][:-1])
    groups = np.empty(len(order), dtype=np.intp)
    groups[order] = np.cumsum(new) - 1
    return groups
