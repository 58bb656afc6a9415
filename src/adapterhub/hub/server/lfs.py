"""Large files, stored under their own sha256, which they get only after digest and size were checked.

Each repository has its own objects, laid out as git-lfs does in a bare repository. So an object can be read
only by who may read a repository that holds it, moving a repository moves them, and deleting it frees their
space.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from adapterhub.hub.server.files import sync_folder
from adapterhub.hub.server.refusals import Refusal, bad_request, too_large

_DIGEST = re.compile(r"[0-9a-f]{64}")
_BUFFER = 1 << 20


def is_digest(oid: object) -> bool:
    return isinstance(oid, str) and _DIGEST.fullmatch(oid) is not None


class LargeFiles:
    """The large files of one repository."""

    def __init__(self, repo_path: Path) -> None:
        self._folder = repo_path / "lfs"

    def path(self, oid: str) -> Path:
        return self._folder / "objects" / oid[:2] / oid[2:4] / oid

    def size(self, oid: str) -> int | None:
        """Bytes of the object, or None when it is not here."""
        try:
            return self.path(oid).stat().st_size
        except FileNotFoundError:
            return None

    def part_path(self, oid: str, upload: str, part: int) -> Path:
        return self._make("incomplete", f"{oid}-{upload}") / f"{part:06d}"

    def new_path(self, oid: str) -> Path:
        """Where an upload is written while it is not yet checked."""
        return self.incomplete() / f"{oid}.{secrets.token_hex(6)}"

    def incomplete(self) -> Path:
        """The folder of uploads that are not yet checked, emptied when a Hub starts."""
        return self._make("incomplete")

    def keep(self, unchecked: Path, oid: str) -> None:
        """Move a file whose digest was checked under its final name."""
        target = self._make("objects", oid[:2], oid[2:4]) / oid
        unchecked.replace(target)
        sync_folder(target.parent)

    def drop_abandoned(self, seconds: int) -> None:
        """Remove uploads that nothing was written to for this long."""
        with contextlib.suppress(FileNotFoundError):
            for path in (self._folder / "incomplete").iterdir():
                if path.stat().st_mtime < time.time() - seconds:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _make(self, *parts: str) -> Path:
        """The folder, made if missing; never the repository itself, which may just have been deleted."""
        folder = self._folder
        for part in ("", *parts):
            folder = folder / part
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
        return folder


async def receive(chunks: AsyncIterator[bytes], path: Path, size: int) -> tuple[int, str]:
    """Write a body of at most ``size`` bytes to ``path``, flushed to the disk -> (bytes, sha256 in hex).

    Memory stays bounded: a buffer of 1 MiB. Nothing stays at ``path`` when the body is too long or breaks
    off.
    """
    digest = hashlib.sha256()
    received = 0
    buffer = bytearray()
    file = await run_in_threadpool(path.open, "xb")

    def drain(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    try:
        with file:
            async for chunk in chunks:
                received += len(chunk)
                if received > size:
                    raise too_large(f"More than the announced {size} bytes were sent")
                buffer += chunk
                if len(buffer) >= _BUFFER:
                    await run_in_threadpool(drain, bytes(buffer))
                    buffer.clear()
            drain(bytes(buffer))
            file.flush()
            await run_in_threadpool(os.fsync, file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return received, digest.hexdigest()


def check_object(oid: str, size: int, found_oid: str, found_size: int) -> None:
    """Refuse bytes that are not what was announced."""
    if found_size != size:
        raise bad_request(
            f"Object {oid}: {size} bytes were announced, {found_size} were sent; nothing was kept"
        )
    if found_oid != oid:
        raise Refusal(
            422, f"Object {oid}: the bytes sent have sha256 {found_oid}; nothing was kept", "DigestMismatch"
        )


def join_parts(files: LargeFiles, oid: str, size: int, upload: str, etags: list[str]) -> None:
    """Put the parts of one upload together, check the whole, keep it. Parts are removed as they are read."""
    folder = files.part_path(oid, upload, 0).parent
    parts = [files.part_path(oid, upload, number) for number in range(1, len(etags) + 1)]
    if len(list(folder.glob("*.etag"))) != len(parts):
        raise bad_request(f"Object {oid}: the upload has other parts than the {len(parts)} that were named")
    for part, etag in zip(parts, etags, strict=True):
        if not part.is_file() or part.with_suffix(".etag").read_text() != etag.strip('"'):
            raise bad_request(f"Object {oid}: part {int(part.name)} was not uploaded, or with another ETag")
    whole = files.new_path(oid)
    try:
        found_size, found_oid = _concatenate(parts, whole)
        check_object(oid, size, found_oid, found_size)
        files.keep(whole, oid)
    finally:
        whole.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _concatenate(parts: Iterable[Path], whole: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    with whole.open("xb") as target:
        for part in parts:
            with part.open("rb") as source:
                while data := source.read(_BUFFER):
                    digest.update(data)
                    target.write(data)
            part.unlink()
        target.flush()
        os.fsync(target.fileno())
        return target.tell(), digest.hexdigest()
