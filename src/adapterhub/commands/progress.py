"""What a transfer shows while it runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import click

_WORTH_SHOWING: Final = 4 << 20  # bytes: less is there before anybody has read of it
_EVERY: Final = 10.0  # seconds between two lines
_UNITS: Final = ("bytes", "KB", "MB", "GB", "TB")


@contextmanager
def show_transfer(words: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield what is to be told, again and again, the bytes that are there and all that are to come.

    On a terminal a bar with rate and time left is on stderr until the block ends; elsewhere a line every ten
    seconds and one at the end, and none at all for what takes less. ``words`` say what is done, like
    ``downloading``; ``quiet`` shows nothing.
    """
    if quiet:
        yield lambda _done, _total: None
    elif sys.stderr.isatty():
        with _bar(words) as tell:
            yield tell
    else:
        yield _Lines(words).tell


@contextmanager
def _bar(words: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        tasks: dict[int, object] = {}

        def tell(done: int, total: int) -> None:
            if total < _WORTH_SHOWING:
                return
            if total not in tasks:
                tasks[total] = progress.add_task(words, total=total, completed=done)
            progress.update(tasks[total], completed=done)  # type: ignore[arg-type]

        yield tell


class _Lines:
    """One transfer after another, in lines of a log."""

    def __init__(self, words: str) -> None:
        self._words, self._total = words, -1
        self._began, self._had = 0.0, 0
        self._told = 0.0

    def tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        if total != self._total:
            self._total, self._had, self._began, self._told = total, done, now, now
        is_long = now - self._began >= _EVERY
        if now - self._told < _EVERY and not (is_long and done == total):
            return
        self._told = now
        rate = (done - self._had) / (now - self._began)
        left = f", {_time((total - done) / rate)} left" if rate > 0 and done < total else ""
        click.echo(
            f"{self._words}: {in_units(done)} of {in_units(total)}, {in_units(rate)}/s{left}", err=True
        )


def in_units(size: float) -> str:
    """Bytes in words, decimal units: ``512 bytes``, ``1.5 GB``."""
    for unit in _UNITS[:-1]:
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} {_UNITS[-1]}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
