"""Uploads through Xet from clients on this machine: hf_xet writes to a folder, the Hub takes the files out.

A client with hf_xet sends every large file through Xet and never asks whether it may use git-lfs instead.
hf_xet can keep its chunks in a plain folder (``local://``), so that is what the Hub offers: one folder for
each upload. When the commit arrives, each file that it names is put together from there, checked by its
sha256, and kept as any other large
file. What is on the disk afterwards does not show which way it came.

The folder's shards say which sha256 has which Xet hash; their layout is
https://huggingface.co/docs/xet/shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import secrets
import shutil
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from adapterhub.hub.server.lfs import LargeFiles, check_object
from adapterhub.hub.server.refusals import Refusal

_PREFIX = "xet-"
_HEADER_BYTES = 48  # of a shard, and of every row that follows
_HEADER = struct.Struct("<32sIIQ")  # file hash, flags, number of segments, unused
_SEGMENT = struct.Struct("<32sIIII")  # xorb hash, flags, bytes, first chunk, end of chunks
_WITH_VERIFICATION = 1 << 31
_WITH_SHA256 = 1 << 30
_END = b"\xff" * 32
_TOKEN_LIFE = 24 * 3600  # seconds; nothing checks the token, the folder's permissions protect it


@dataclass(frozen=True, slots=True)
class XetFile:
    """One file that a shard describes."""

    hash: str
    """Xet's own hash, 64 hex digits"""
    sha256: str
    size: int
    """bytes"""


def is_available() -> bool:
    return importlib.util.find_spec("hf_xet") is not None


def new_folder(files: LargeFiles) -> Path:
    """An empty folder for one upload, open to this user alone."""
    folder = files.incomplete() / f"{_PREFIX}{secrets.token_hex(8)}"
    folder.mkdir(mode=0o700)
    return folder


def restore(files: LargeFiles, oids: Iterable[str]) -> None:
    """Put together and keep those of the files that came through Xet. Refuses damaged ones (422)."""
    missing = {oid for oid in oids if files.size(oid) is None}
    for folder in files.incomplete().glob(f"{_PREFIX}*") if missing else ():
        wanted = {found.sha256: found for found in _read_shards(folder) if found.sha256 in missing}
        if wanted:
            _take(files, folder, wanted)
            missing -= wanted.keys()


def drop_emptied(files: LargeFiles, taken: Iterable[str]) -> None:
    """Remove the folders that files in ``taken`` came from, once every file in them is kept."""
    wanted = set(taken)
    for folder in files.incomplete().glob(f"{_PREFIX}*"):
        held = {found.sha256 for found in _read_shards(folder)}
        if held & wanted and all(files.size(oid) is not None for oid in held):
            shutil.rmtree(folder, ignore_errors=True)


def _take(files: LargeFiles, folder: Path, wanted: dict[str, XetFile]) -> None:
    hf_xet = importlib.import_module("hf_xet")
    unchecked = {oid: files.new_path(oid) for oid in wanted}
    end = int(time.time()) + _TOKEN_LIFE
    try:
        with (
            _view(folder) as view,
            hf_xet.XetSession().new_file_download_group(
                endpoint=f"local://{view}", token="local", token_expiry_unix_secs=end
            ) as group,
        ):
            for oid, found in wanted.items():
                group.start_download_file(hf_xet.XetFileInfo(found.hash, found.size), str(unchecked[oid]))
        for oid, found in wanted.items():
            _keep_checked(files, found, unchecked[oid])
    except RuntimeError as err:
        text = f"Not all files arrived whole through Xet ({err}); upload them again"
        raise Refusal(422, text, "DigestMismatch") from err
    finally:
        for path in unchecked.values():
            path.unlink(missing_ok=True)


def _keep_checked(files: LargeFiles, found: XetFile, unchecked: Path) -> None:
    with unchecked.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    check_object(found.sha256, found.size, digest, unchecked.stat().st_size)
    files.keep(unchecked, found.sha256)


@contextlib.contextmanager
def _view(folder: Path) -> Iterator[Path]:
    """The folder under another name, with a copy of the index that the client may still hold locked."""
    view = folder.with_name(f"view-{secrets.token_hex(8)}")
    source, target = (it / "xet" / "xorbs" for it in (folder, view))
    target.mkdir(parents=True)
    try:
        for path in source.iterdir():
            if path.is_dir():
                (target / path.name).symlink_to(path, target_is_directory=True)
            else:
                shutil.copyfile(path, target / path.name)
        yield view
    finally:
        shutil.rmtree(view)


def _read_shards(folder: Path) -> Iterator[XetFile]:
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        yield from read_shard(shard.read_bytes())


def read_shard(shard: bytes) -> Iterator[XetFile]:
    """The files that a shard describes, as far as it can be read."""
    position = _HEADER_BYTES
    while position + _HEADER_BYTES <= len(shard):
        file_hash, flags, count, _ = _HEADER.unpack_from(shard, position)
        verified = count if flags & _WITH_VERIFICATION else 0
        segments = position + _HEADER_BYTES
        metadata = segments + (count + verified) * _HEADER_BYTES
        if file_hash == _END or metadata + _HEADER_BYTES > len(shard):
            return
        if flags & _WITH_SHA256:
            size = sum(_SEGMENT.unpack_from(shard, segments + row * _HEADER_BYTES)[2] for row in range(count))
            yield XetFile(_hex(file_hash), _hex(shard[metadata : metadata + 32]), size)
        position = metadata + (_HEADER_BYTES if flags & _WITH_SHA256 else 0)


def _hex(digest: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))
