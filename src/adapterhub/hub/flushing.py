"""Bringing a large file to the disk while it grows, so that the fsync at its end finds little left to do."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

_AT_ONCE: Final = 64 << 20  # bytes
_write_out = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class Flusher:
    """Writes out what was written to one open file, beside whoever writes on; nothing for a small file."""

    def __init__(self, descriptor: int, size: int) -> None:
        """``size``: bytes that the file will have."""
        self._descriptor, self._grown = descriptor, 0
        self._thread = ThreadPoolExecutor(1) if size > 2 * _AT_ONCE else None
        self._flush: Future[None] | None = None

    def add(self, size: int) -> None:
        """``size`` more bytes have been given to the file. Raises OSError when earlier ones cannot be
        written."""
        self._grown += size
        if self._thread is None or self._grown < _AT_ONCE:
            return
        if self._flush is not None:
            if not self._flush.done():
                return
            self._flush.result()
        self._grown = 0
        self._flush = self._thread.submit(_write_out, self._descriptor)

    def close(self) -> None:
        """Wait for the last flush: the file may be closed after. Raises OSError when it failed, which no
        later fsync would tell."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        if self._flush is not None:
            self._flush.result()
