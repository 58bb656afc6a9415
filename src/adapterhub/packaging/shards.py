"""Rewriting one safetensors file into another, a piece at a time: read, change, write, hash, all at once.

One thread reads and hashes the source in order, several change pieces, and the caller's thread writes and
hashes the result in order. Buffers are reused, nothing is mapped, so memory does not grow with the file.
What a piece becomes depends on that piece alone: the bytes written are the same whatever the number of
threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.packaging.manifest import FileEntry
from adapterhub.packaging.tensors import TensorFile, read_exactly

if TYPE_CHECKING:
    from hashlib import _Hash as HASH

# Beside those being changed: one being read, one being written, one waiting.
_BUFFERS_BESIDES = 3

Change = Callable[[memoryview], memoryview]
"""From a piece's bytes to its new bytes; may change them in place and return the same view."""


@dataclass(frozen=True)
class Piece:
    """A run of bytes of a source file."""

    offset: int
    """First byte, counted from the start of the file."""
    size: int
    """Bytes."""
    change: Change | None
    """None: copied as it is."""


@dataclass(frozen=True)
class Digests:
    """What went in and what came out."""

    source_sha256: str
    """Of every byte of the source, 64 hex digits."""
    target: FileEntry


def rewrite_shard(
    source: TensorFile,
    target: Path,
    header: bytes,
    pieces: Sequence[Piece],
    *,
    threads: int,
    digests: bool,
    progress: Callable[[int], None],
) -> Digests | None:
    """Write ``header``, then every piece of ``source`` changed, to the new file ``target``.

    ``pieces`` cover the source's tensors in order, without gaps. ``threads`` change pieces at the same time;
    ``progress`` is told of each piece's bytes as they are written. With ``digests`` both files are hashed on
    the way. Raises ReleaseError when the source ends early, and OSError (a full disk) with ``target`` left
    for the caller's staging folder to remove.
    """
    largest = max((piece.size for piece in pieces), default=0)
    free = deque(bytearray(largest) for _ in range(min(len(pieces), threads + _BUFFERS_BESIDES)))
    ahead: deque[tuple[Piece, bytearray, Future[memoryview]]] = deque()
    with (
        source.path.open("rb", buffering=0) as reader,
        target.open("xb", buffering=0) as writer,
        ThreadPoolExecutor(1, "read") as reading,
        ThreadPoolExecutor(threads, "change") as changing,
    ):
        copy = _Copy(source.path, reader, writer, *((sha256(), sha256()) if digests else (None, None)))

        def finish_first() -> None:
            piece, buffer, changed = ahead.popleft()
            copy.write(changed.result())
            progress(piece.size)
            free.append(buffer)

        try:
            copy.read(0, memoryview(bytearray(source.data_start)))
            copy.write(memoryview(header))
            for piece in pieces:
                if not free:
                    finish_first()
                buffer = free.popleft()
                view = reading.submit(copy.read, piece.offset, memoryview(buffer)[: piece.size])
                ahead.append((piece, buffer, changing.submit(_change, piece, view)))
            while ahead:
                finish_first()
        except BaseException:
            reading.shutdown(wait=False, cancel_futures=True)
            changing.shutdown(wait=False, cancel_futures=True)
            raise
    return copy.digests()


def _change(piece: Piece, view: Future[memoryview]) -> memoryview:
    return piece.change(view.result()) if piece.change else view.result()


@dataclass
class _Copy:
    """The two open files of a rewrite, and the hashes of what was read and written so far."""

    path: Path
    reader: FileIO
    writer: FileIO
    read_hash: HASH | None
    written_hash: HASH | None
    size: int = 0
    """Bytes written."""

    def read(self, offset: int, view: memoryview) -> memoryview:
        read_exactly(self.reader.fileno(), view, offset, self.path)
        if self.read_hash:
            self.read_hash.update(view)
        return view

    def write(self, view: memoryview) -> None:
        if self.written_hash:
            self.written_hash.update(view)
        self.size += len(view)
        while view:
            view = view[self.writer.write(view) :]

    def digests(self) -> Digests | None:
        if not self.read_hash or not self.written_hash:
            return None
        written = FileEntry(sha256=self.written_hash.hexdigest(), size=self.size)
        return Digests(self.read_hash.hexdigest(), written)
