"""Sets of small numbers, and records that are too many for memory: both as numpy arrays of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_BUCKETS = 64
PIECE = 1 << 20
"""Records of a bucket that are read at once, however many it holds."""


class Bits:
    """A set of numbers below ``size``, one bit each."""

    def __init__(self, size: int) -> None:
        self._bytes = np.zeros(size // 8 + 1, dtype=np.uint8)

    def add(self, numbers: NDArray[np.uint64]) -> None:
        """``numbers``: any shape, each below the size."""
        np.bitwise_or.at(self._bytes, numbers >> np.uint64(3), _masks(numbers))

    def holds(self, numbers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Of each number, whether it is in the set; the same shape."""
        return (self._bytes[numbers >> np.uint64(3)] & _masks(numbers)) != 0

    def count(self) -> int:
        return int(np.bitwise_count(self._bytes).sum())

    def first(self, most: int) -> list[int]:
        """The lowest numbers in the set, at most ``most``."""
        found: list[int] = []
        for byte in np.flatnonzero(self._bytes)[:most]:
            found += [int(byte) * 8 + bit for bit in range(8) if self._bytes[byte] >> bit & 1]
        return found[:most]


@dataclass(frozen=True)
class Bucket:
    """One file of records: any number of them, read a piece of bounded size at a time."""

    path: Path
    dtype: np.dtype[Any]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """The pieces, in the order in which the records were added."""
        size = PIECE * self.dtype.itemsize
        for start in range(0, self.path.stat().st_size, size):
            yield np.fromfile(self.path, self.dtype, count=PIECE, offset=start)


class Spool:
    """Records on the disk in 64 files, by the topmost bits of their field ``hash`` (uint64).

    Equal hashes share a file, so that what belongs together is found by comparing the pieces of one file.
    """

    def __init__(self, folder: Path, fields: list[tuple[str, type]]) -> None:
        self._dtype = np.dtype([("hash", np.uint64), *fields])
        self._paths = [folder / f"{number:02d}" for number in range(_BUCKETS)]
        folder.mkdir(parents=True)
        self._stack = ExitStack()
        self._files: list[IO[bytes]] = [self._stack.enter_context(path.open("wb")) for path in self._paths]

    def add(self, hashes: NDArray[np.uint64], **fields: Any) -> None:
        """One record for each hash; ``fields``: an array of that length each, or one value for all."""
        records = np.empty(len(hashes), dtype=self._dtype)
        records["hash"] = hashes
        for name, values in fields.items():
            records[name] = values
        buckets = (hashes >> np.uint64(58)).astype(np.uint8)
        records = records[np.argsort(buckets, kind="stable")]
        ends = np.cumsum(np.bincount(buckets, minlength=_BUCKETS))
        start = 0
        for file, end in zip(self._files, ends.tolist(), strict=True):
            if end > start:
                file.write(records[start:end].tobytes())
            start = end

    def buckets(self) -> list[Bucket]:
        """The files; nothing can be added any more."""
        self._stack.close()
        return [Bucket(path, self._dtype) for path in self._paths]

    def close(self) -> None:
        self._stack.close()


def _masks(numbers: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (numbers & np.uint64(7)).astype(np.uint8))
