"""sha256 of large files, found once: kept in the user's cache for as long as a file is provably untouched.

A kept digest is taken only for the very inode (with its file system) whose size, time of change of content
and time of change of the inode itself are what they were. The last no program can set back. What could still
deceive is not cached: a file that was changed within the last seconds, since a second change may fall into
the same tick of the clock; and times in whole seconds, as images made to be reproducible have them, where
two files can look the same. A cache that others may write to is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from adapterhub.packaging.files import write_atomic

CACHE_VARIABLE: Final = "ADAPTERHUB_CACHE"
_SETTLED_NS: Final = 3 * 10**9
_SECOND_NS: Final = 10**9
_MAX_THREADS: Final = 8
_SMALL: Final = 1024 * 1024
"""Bytes below which hashing is faster than looking a digest up."""


def hash_files(paths: Iterable[Path]) -> dict[Path, str]:
    """The sha256 of each file, 64 hex digits: from the cache, or read now, several at once.

    Raises OSError for a file that cannot be read; a cache that cannot be used only costs time.
    """
    wanted = list(dict.fromkeys(paths))
    if not wanted:
        return {}
    cache = _usable_cache()
    threads = min(len(wanted), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    with ThreadPoolExecutor(min(threads, _MAX_THREADS)) as pool:  # hashlib lets other threads run
        return dict(zip(wanted, pool.map(lambda path: _digest(path, cache), wanted), strict=True))


def cache_folder() -> Path:
    """Where digests are kept: ``$ADAPTERHUB_CACHE``, else ``adapterhub`` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen) / "digests"
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "adapterhub" / "digests"


def _digest(path: Path, cache: Path | None) -> str:
    """The digest of one file; what is kept of it is taken if the open file itself is what was hashed then."""
    with path.open("rb") as file:
        descriptor = file.fileno()
        if cache is None or os.fstat(descriptor).st_size < _SMALL:
            return hashlib.file_digest(file, "sha256").hexdigest()
        identity = _identity(descriptor)
        entry = cache / f"{identity['device']}-{identity['inode']}.json"
        kept = _read_entry(entry, identity)
        if kept is not None:
            return kept
        _flush(descriptor)
        before = _identity(descriptor)  # a write through a memory map shows in the times once it is flushed
        started = time.time_ns()
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _identity(descriptor) == before and _is_settled(before, started):
            _write_entry(entry, before | {"sha256": digest})
        return digest


def _identity(descriptor: int) -> dict[str, int]:
    """What tells one state of a file from every other."""
    stat = os.fstat(descriptor)
    system = os.fstatvfs(descriptor)
    return {
        "device": stat.st_dev,
        "file_system": system.f_fsid,
        "inode": stat.st_ino,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }


def _is_settled(identity: dict[str, int], now_ns: int) -> bool:
    """Whether another change would show: the last one is some time past, and times are finer than seconds."""
    changed = identity["ctime_ns"]
    return changed % _SECOND_NS != 0 and changed + _SETTLED_NS < now_ns


def _flush(descriptor: int) -> None:
    """Put what was written on the disk, so that every later write gets a time of its own."""
    with contextlib.suppress(OSError):  # some file systems cannot; on a read-only one nothing is unwritten
        os.fsync(descriptor)


def _read_entry(path: Path, identity: dict[str, int]) -> str | None:
    """The digest kept of this very state of a file."""
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("sha256")
    except (OSError, ValueError, AttributeError, KeyError):
        return None
    is_digest = isinstance(digest, str) and len(digest) == 64
    return digest if is_digest and content == identity else None


def _write_entry(path: Path, entry: dict[str, int | str]) -> None:
    """Keep a digest: one file each, written whole, so that processes at work at once cannot mix them up."""
    with contextlib.suppress(OSError):  # a full or read-only disk: it is hashed again next time
        write_atomic(path, json.dumps(entry).encode())


def _usable_cache() -> Path | None:
    """The cache's folder, made when missing; None when it cannot be, or when others may write to it."""
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.stat()
    except OSError:
        return None
    return folder if stat.st_uid == os.geteuid() and not stat.st_mode & 0o022 else None
