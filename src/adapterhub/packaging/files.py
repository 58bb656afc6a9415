"""Files written whole or not at all, and named and hashed safely."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from adapterhub.errors import ReleaseError
from adapterhub.packaging.temporary import temporary_beside

MANIFEST_NAME = "adapterhub.json"
_MAX_PATH_CHARS = 512
_WORTH_A_THREAD = 1 << 20  # bytes
_NO_NAMES = frozenset(("", ".", ".."))
_COMMIT = re.compile(r"[0-9a-f]{40}")


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader or a crash sees the old file or the new one, never a part.

    The bytes go to a temporary name in the same folder, are fsynced, and are renamed over ``path``.
    Raises OSError (ENOSPC and the like) with ``path`` unchanged and the temporary removed.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` when the block ends well, else is removed.

    What a killed process left there goes first. Raises ReleaseError as ``check_target`` does.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(target) as staging:
        try:
            yield staging
            publish_folder(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def check_target(target: Path) -> None:
    """Raise ReleaseError unless a folder can be made at ``target``.

    Not when it exists and is not an empty folder: nothing is ever overwritten; nor when it lies inside a
    release, which it would break.
    """
    for above in target.absolute().parents:
        if (above / MANIFEST_NAME).is_file():
            raise ReleaseError(f"{target} lies inside the release {above}", "choose an --out beside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ReleaseError(f"{target} exists already", "choose another --out, or remove it first")


def publish_folder(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target`` beside it, every file fsynced before."""
    for path in sorted(staging.rglob("*")):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o644)
            _fsync(path)
        elif path.is_dir():
            fsync_folder(path)
    staging.chmod(0o755)
    fsync_folder(staging)
    staging.replace(target)  # atomic; replaces an empty folder on POSIX
    fsync_folder(target.parent)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 lower-case hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of files in ``folder`` by name, the large ones in parallel: one thread a processor core.

    Raises OSError when one cannot be read.
    """
    sizes = {name: (folder / name).stat().st_size for name in names}
    large = [name for name, size in sizes.items() if size >= _WORTH_A_THREAD]
    large.sort(key=sizes.__getitem__, reverse=True)  # long ones first
    digests = {name: sha256_file(folder / name) for name in sizes.keys() - large}
    if large:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ThreadPoolExecutor(max_workers=cores) as pool:
            digests |= zip(large, pool.map(lambda name: sha256_file(folder / name), large), strict=True)
    return {name: digests[name] for name in sizes}


def check_relative_path(path: str) -> str:
    """Return ``path`` if it is a plain relative POSIX path inside a folder; else raise ValueError saying why.

    Refused: absolute paths, ``..``, ``.`` and empty parts, backslashes, drive letters, control characters,
    over 512 characters. A manifest, a Hub listing and a command line all name files this way.
    """
    if not path or len(path) > _MAX_PATH_CHARS:
        raise ValueError(f"a file name of {len(path)} characters (1 to {_MAX_PATH_CHARS} are allowed)")
    if path.startswith("/") or "\\" in path or path[1:2] == ":":
        raise ValueError(f"{path!r} is not a relative path with forward slashes")
    if not path.isprintable():
        raise ValueError(f"{path!r} holds control or invisible characters")
    if not _NO_NAMES.isdisjoint(path.split("/")):
        raise ValueError(f"{path!r} has an empty, '.' or '..' part")
    return path


def list_files(folder: Path) -> list[str]:
    """The sorted relative POSIX paths of all files below ``folder``, links to files among them.

    None when there is no such folder; raises OSError when one cannot be read.
    """
    found = []

    def refuse(err: OSError) -> None:
        if not isinstance(err, FileNotFoundError):  # what cannot be read could hold anything
            raise err

    for root, _dirs, names in os.walk(folder, onerror=refuse):
        inside = Path(root).relative_to(folder).as_posix()
        found += [name if inside == "." else f"{inside}/{name}" for name in names]
    return sorted(found)


def cached_ref(folder: Path) -> str | None:
    """``owner/name@commit`` for a folder of the Hugging Face cache, None for any other."""
    parts = folder.resolve().parts
    for repo, middle, commit in zip(parts, parts[1:], parts[2:], strict=False):
        kind, _, name = repo.partition("--")
        if kind in ("models", "datasets") and middle == "snapshots" and _COMMIT.fullmatch(commit):
            return f"{name.replace('--', '/')}@{commit}"
    return None


def fsync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
