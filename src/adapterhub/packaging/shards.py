"""Rewriting safetensors files, a piece at a time: read, hash, change, write and hash, all at once.

For each file one thread reads and hashes the source in order, one writes and one hashes the result in order;
some threads change the pieces of all files. Buffers are reused and nothing is mapped, so memory does not
grow with the files. What a piece becomes depends on that piece alone: the bytes written are the same
whatever the number of threads.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from adapterhub.packaging.manifest import FileEntry
from adapterhub.packaging.tensors import TensorFile, read_exactly

Change = Callable[[memoryview], memoryview]
"""From a piece's bytes to its new bytes; may change them in place and return the same view."""
Progress = Callable[[int, int], None]
"""Told the bytes of the sources that are done, and all of them."""

Finished = Callable[[str, "Digests | None"], None]
"""Told a file's name when it is on the disk, and its digests if they were asked for."""

# For pieces in flight, all files together; a file keeps two buffers whatever its pieces' size.
_BUFFER_BYTES = 256 * 1024 * 1024
_FEWEST_BUFFERS = 2
# Beside those being changed: one being read, one being written, two being hashed or waiting.
_BUFFERS_BESIDES = 4
_MOST_FILES = 8


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
class Rewrite:
    """One file to make from another."""

    source: TensorFile
    target: Path
    """A file that does not exist yet."""
    header: bytes
    """What the new file begins with."""
    pieces: Sequence[Piece]
    """Cover the source's tensors in order, without gaps."""

    @property
    def largest(self) -> int:
        """Bytes of the largest piece."""
        return max((piece.size for piece in self.pieces), default=0) or 1


@dataclass(frozen=True)
class Digests:
    """What went in and what came out."""

    source_sha256: str
    """Of every byte of the source, 64 hex digits."""
    target: FileEntry


class _Stopped(Exception):
    """Another file failed, so this one need not go on."""


def rewrite_files(
    rewrites: Sequence[Rewrite], *, threads: int, digests: bool, progress: Progress, finished: Finished
) -> None:
    """Make every file, some at the same time; ``threads`` threads change pieces for all of them.

    With ``digests`` sources and results are hashed on the way. Each file is fsynced before ``finished`` hears
    of it, in the thread that made it. Raises ReleaseError when a source ends early, and OSError (a full disk)
    with the targets left for the caller's staging folder to keep or remove.
    """
    stopped, lock = threading.Event(), threading.Lock()
    done, total = 0, sum(rewrite.source.size for rewrite in rewrites)
    largest = max((rewrite.largest for rewrite in rewrites), default=1)
    at_once = max(1, min(len(rewrites), threads, _MOST_FILES, _BUFFER_BYTES // (_FEWEST_BUFFERS * largest)))
    wanted = math.ceil(threads / at_once) + _BUFFERS_BESIDES
    buffers = max(_FEWEST_BUFFERS, min(wanted, _BUFFER_BYTES // at_once // largest))

    def advance(count: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise _Stopped
        with lock:
            done += count
            progress(done, total)

    def run(rewrite: Rewrite) -> None:
        try:
            made = _rewrite_file(rewrite, changing, buffers, digests, advance)
            finished(rewrite.target.name, made)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(threads, "change") as changing, ThreadPoolExecutor(at_once, "file") as pool:
        futures = [pool.submit(run, rewrite) for rewrite in rewrites]
        try:
            ended, _running = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # an interrupt
            stopped.set()
            raise
    for error in (future.exception() for future in ended):
        if error is not None and not isinstance(error, _Stopped):
            raise error


def _rewrite_file(
    rewrite: Rewrite, changing: Executor, buffers: int, digests: bool, advance: Callable[[int], None]
) -> Digests | None:
    """Keep every thread busy with the pieces ahead, as many as there are buffers, and write them in order."""
    hashes = (sha256(), sha256()) if digests else None
    free: deque[tuple[bytearray, Future[None] | None]] = deque(
        (bytearray(rewrite.largest), None) for _ in range(min(buffers, len(rewrite.pieces)))
    )
    ahead: deque[tuple[Piece, bytearray, Future[memoryview]]] = deque()
    with (
        rewrite.source.path.open("rb", buffering=0) as reader,
        rewrite.target.open("xb", buffering=0) as writer,
        ThreadPoolExecutor(1, "read") as reading,
        ThreadPoolExecutor(1, "hash") as hashing,
    ):

        def read(offset: int, view: memoryview) -> memoryview:
            read_exactly(reader.fileno(), view, offset, rewrite.source.path)
            if hashes:
                hashes[0].update(view)
            return view

        def write(view: memoryview) -> Future[None] | None:
            hashed = hashing.submit(hashes[1].update, view) if hashes else None
            while view:
                view = view[writer.write(view) :]
            return hashed

        def finish_first() -> None:
            piece, buffer, changed = ahead.popleft()
            free.append((buffer, write(changed.result())))
            advance(piece.size)

        try:
            read(0, memoryview(bytearray(rewrite.source.data_start)))
            write(memoryview(rewrite.header))
            for piece in rewrite.pieces:
                if not free:
                    finish_first()
                buffer, hashed = free.popleft()
                if hashed:
                    hashed.result()
                view = reading.submit(read, piece.offset, memoryview(buffer)[: piece.size])
                ahead.append((piece, buffer, changing.submit(_change, piece, view)))
            while ahead:
                finish_first()
            # While other files are being made, rather than for all of them at the end.
            os.fsync(writer.fileno())
        except BaseException:
            for future in (future for _piece, _buffer, future in ahead):
                future.cancel()
            for pool in (reading, hashing):
                pool.shutdown(wait=False, cancel_futures=True)
            raise
        size = writer.tell()
    if hashes is None:
        return None
    return Digests(hashes[0].hexdigest(), FileEntry(sha256=hashes[1].hexdigest(), size=size))


def _change(piece: Piece, view: Future[memoryview]) -> memoryview:
    return piece.change(view.result()) if piece.change else view.result()
