"""Bytes of a transfer, counted for whoever watches it."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told the bytes that are there, and all that are to come."""


class Tally:
    """The bytes that have passed, over all threads."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress, self._done, self._lock = total, progress, 0, threading.Lock()

    def add(self, size: int) -> None:
        """``size`` more bytes have passed; fewer than none when some must pass again."""
        with self._lock:
            self._done += size
            self._progress(self._done, self._total)
