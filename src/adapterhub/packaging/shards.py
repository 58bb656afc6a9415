"""Rewriting one safetensors file into another, a piece at a time: read, change, write, hash, all at once.

One thread reads and hashes the source in order, several change pieces, and the caller's thread writes and
hashes the result in order. Buffers are reused, nothing is mapped, so memory does not grow with the file.
What a piece becomes depends on that piece alone: the bytes written are the same whatever the number of
threads.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from adapterhub.packaging.manifest import FileEntry
from adapterhub.packaging.tensors import TensorFile, read_exactly

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
class Rewritten:
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
    progress: Callable[[int], None],
) -> Rewritten:
    """Write ``header``, then every piece of ``source`` changed, to the new file ``target``.

    ``pieces`` cover the source's tensors in order, without gaps. ``threads`` change pieces at the same time;
    ``progress`` is told of each piece's bytes as they are written. Raises ReleaseError when the source ends
    early, and OSError (a full disk) with ``target`` left for the caller's staging folder to remove.
    """
    read_digest, written_digest = hashlib.sha256(), hashlib.sha256()
    largest = max((piece.size for piece in pieces), default=0)
    with (
        source.path.open("rb", buffering=0) as reader,
        target.open("xb", buffering=0) as writer,
        ThreadPoolExecutor(1, "read") as reading,
        ThreadPoolExecutor(threads, "change") as changing,
    ):

        def read(piece: Piece, buffer: bytearray) -> memoryview:
            view = memoryview(buffer)[: piece.size]
            read_exactly(reader.fileno(), view, piece.offset, source.path)
            read_digest.update(view)
            return view

        def change(piece: Piece, view: Future[memoryview]) -> memoryview:
            return piece.change(view.result()) if piece.change else view.result()

        def write(view: memoryview) -> int:
            written_digest.update(view)
            rest = view
            while rest:
                rest = rest[writer.write(rest) :]
            return len(view)

        read(Piece(0, source.data_start, None), bytearray(source.data_start))
        size = write(memoryview(header))
        free = deque(bytearray(largest) for _ in range(min(len(pieces), threads + 3)))
        ahead: deque[tuple[Piece, bytearray, Future[memoryview]]] = deque()

        def finish_first() -> int:
            piece, buffer, future = ahead.popleft()
            count = write(future.result())
            progress(piece.size)
            free.append(buffer)
            return count

        try:
            for piece in pieces:
                if not free:
                    size += finish_first()
                buffer = free.popleft()
                view = reading.submit(read, piece, buffer)
                ahead.append((piece, buffer, changing.submit(change, piece, view)))
            while ahead:
                size += finish_first()
        except BaseException:
            reading.shutdown(wait=False, cancel_futures=True)
            changing.shutdown(wait=False, cancel_futures=True)
            raise
    return Rewritten(read_digest.hexdigest(), FileEntry(sha256=written_digest.hexdigest(), size=size))
