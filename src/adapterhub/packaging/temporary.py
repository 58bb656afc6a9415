"""A temporary folder beside its target: what a killed process left of one, the next for that target removes.

A process holds a lock on its folder as long as it lives, so that nobody takes the folder for a leftover.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """A new folder ``.TARGET.*.tmp``, locked during the block; whoever made it moves or removes it.

    Leftovers go first. Raises OSError.
    """
    remove_leftovers(target)
    folder, lock = _make(target)
    try:
        yield folder
    finally:
        os.close(lock)


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder for a while, on the disk that ``target`` will be on. Leftovers go first. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(target) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Remove temporary folders of ``target`` that no living process holds, as far as they can be."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.tmp")  # the names that tempfile gives
    with os.scandir(target.parent) as entries:
        found = [Path(entry) for entry in entries if ours.fullmatch(entry.name)]
    for folder in found:
        with suppress(OSError):  # no folder, another user's, gone by now, or held
            lock = _open(folder)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def _make(target: Path) -> tuple[Path, int]:
    """A new folder, and its lock's descriptor."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            lock = _open(folder)
        except FileNotFoundError:  # taken for a leftover before it was locked
            continue
        with suppress(OSError):  # a file system without locks: nobody removes leftovers there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder, lock
        os.close(lock)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
