"""A folder in the making that outlives who makes it: a killed run leaves finished files to the next.

It lies beside the target in ``.TARGET.partial``: a folder of files and a journal of those that are done. The
journal names what they were made from and how; a run that makes something else begins anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterHubError, ReleaseError, TrainingError
from adapterhub.packaging.files import check_target, fsync_folder, publish_folder, sha256_file

_JOURNAL, _FILES, _SCRATCH = "journal.jsonl", "files", "scratch"


@dataclass
class Staging:
    """A folder that somebody is filling."""

    folder: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was noted with each finished file, by its name; those of an earlier run are as noted."""
    _writing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def scratch(self) -> Path:
        """A folder for what is needed on the way to make it; it lasts as long as unfinished files do."""
        return self.folder.parent / _SCRATCH

    def note(self, name: str, sha256: str | None, facts: dict[str, Any]) -> None:
        """Remember that the file ``name`` is finished and fsynced; ``facts`` come back in ``done``.

        With its ``sha256`` the next run hashes it again before it trusts it. Any thread may call this.
        """
        size = (self.folder / name).stat().st_size
        line = {"name": name, "size": size, "sha256": sha256, "facts": facts}
        with self._writing, (self.folder.parent / _JOURNAL).open("a", encoding="utf-8") as file:
            fsync_folder(self.folder)
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            self.done[name] = facts


@contextmanager
def resumable_folder(target: Path, key: str) -> Iterator[Staging]:
    """A folder that becomes ``target`` when the block ends well; what was finished stays when it is cut off.

    ``key`` says in one line what is made of what: only a run with the same key goes on. On an error that the
    next run would meet again (AdapterHubError, OSError; but not for want of memory, or of somebody who reads
    what is printed) and when nothing is finished, everything is removed.
    Raises ReleaseError as ``check_target`` does, and when another process is making ``target``.
    """
    check_target(target)
    partial = target.parent / f".{target.name}.partial"
    files, journal = partial / _FILES, partial / _JOURNAL
    files.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as lock:
        _lock(lock.fileno(), target)
        lines = _read(journal)
        if not lines or lines[0] != {"key": key}:
            lines = []
            shutil.rmtree(partial / _SCRATCH, ignore_errors=True)
        staging = Staging(files, _finished(lines[1:], files))
        if not staging.done:
            journal.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
        _remove_others(files, staging.done)
        try:
            yield staging
            publish_folder(files, target)
            shutil.rmtree(partial)
        except BaseException as err:
            refused = isinstance(err, (AdapterHubError, OSError))
            passing = isinstance(err, (TrainingError, BrokenPipeError))
            begun = staging.done or staging.scratch.is_dir()
            if (refused and not passing) or not begun:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def unfinished(target: Path) -> Path | None:
    """Where the files of a ``target`` lie that a run left unfinished; None when there are none."""
    partial = target.parent / f".{target.name}.partial"
    return partial if (partial / _JOURNAL).is_file() else None


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise ReleaseError(
            f"another process is making {target}", "wait until it is done, or choose another --out"
        ) from err


def _read(journal: Path) -> list[dict[str, Any]]:
    """The lines of the journal, as far as they were written whole."""
    lines = []
    try:
        for line in journal.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    except ValueError:
        pass  # cut off inside a line
    return lines


def _finished(lines: Sequence[dict[str, Any]], files: Path) -> dict[str, dict[str, Any]]:
    """The noted files that are as noted, with what was noted."""
    return {line["name"]: line["facts"] for line in lines if _is_as_noted(files / line["name"], line)}


def _is_as_noted(path: Path, line: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != line["size"]:
        return False
    return line["sha256"] is None or sha256_file(path) == line["sha256"]


def _remove_others(files: Path, done: dict[str, dict[str, Any]]) -> None:
    for path in files.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in done:
            path.unlink()
