"""Small files in memory: read once, so that what is checked is what is sent, whatever is written since."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from hashlib import sha1, sha256
from pathlib import Path
from typing import Final, NamedTuple

_FILE: Final = 1 << 20  # bytes of the largest that is held
_ALL: Final = 256 << 20  # bytes of all together


class HeldFile(NamedTuple):
    """One file's bytes."""

    data: bytes
    sha256: str
    """64 hex digits."""

    @property
    def blob(self) -> str:
        """git's name for the content."""
        return sha1(b"blob %d\0" % len(self.data) + self.data, usedforsecurity=False).hexdigest()


def hold_small_files(folder: Path, names: Iterable[str]) -> dict[str, HeldFile]:
    """Those of the files that are small, by name, until 256 MiB are held; one that is missing is left out.

    Raises OSError for a file that cannot be read.
    """
    found: dict[str, HeldFile] = {}
    left = _ALL
    for name in names:
        data = _read(folder / name, min(_FILE, left))
        if data is not None:
            left -= len(data)
            found[name] = HeldFile(data, sha256(data).hexdigest())
    return found


def _read(path: Path, most: int) -> bytes | None:
    """A file's bytes; None when there is no such file, or it is larger than ``most``."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe is no file, and is not waited for
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        known = os.fstat(file)
        if not stat.S_ISREG(known.st_mode) or known.st_size > most:
            return None
        data = os.read(file, known.st_size + 1)
        return data if len(data) == known.st_size else None  # one that grows is read as large ones are
    finally:
        os.close(file)
