"""Notes in the cache: what was found when files were hashed, so that those untouched are not hashed again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path

from adapterhub.packaging.files import check_relative_path, write_atomic


def read_record(path: Path, folder: Path) -> tuple[dict[str, str], list[str]]:
    """The sha256 of files in ``folder`` that a record holds, by name, and which of them were touched since.

    A file counts as touched when its size, its time of change or its inode's time of change differ, or when
    it is gone. Both are empty when there is no record, or no sound one, so that all is hashed anew.
    """
    try:
        content = json.loads(path.read_bytes())
        entries = {check_relative_path(name): dict(entry) for name, entry in content.items()}
        digests = {name: str(entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}, []
    touched = [name for name, entry in entries.items() if _entry(folder / name, digests[name]) != entry]
    return digests, touched


def write_record(path: Path, folder: Path, digests: Mapping[str, str]) -> None:
    """Note the sha256 of files in ``folder`` as they are now; a cache that others own works without.

    The files are on the disk before the note is: a power cut leaves no torn file that a note vouches for.
    """
    entries = {name: _entry(folder / name, digest) for name, digest in digests.items()}
    try:
        for name in digests:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        write_note(path, json.dumps(entries, indent=1).encode(), path.parent.parent)
    except OSError as err:
        if err.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def write_note(path: Path, data: bytes, cache: Path) -> None:
    """Write a small file of a repository's folder ``cache`` in the Hugging Face cache, whole or not at all.

    What a process that was killed left of its try is removed: only who holds the lock writes notes. Raises
    OSError.
    """
    locks = cache.parent / ".locks" / cache.name  # where huggingface_hub keeps its own
    for folder in (locks, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with (locks / "notes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            stale.unlink(missing_ok=True)
        write_atomic(path, data)


def _entry(path: Path, digest: str) -> dict[str, object] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,  # no program can set it back
        "sha256": digest,
    }
