"""What the person at the terminal sees while questions are asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from adapterhub.cards.evaluation import StageReport

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_on_stderr(things: str = "rows") -> Iterator[StageReport]:
    """A function to report to: a live bar a stage on a terminal, a plain line now and then elsewhere.

    ``things`` is what is counted, in the plural.
    """
    if not sys.stderr.isatty():
        yield _lines(things)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(things),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done)

        yield report


def _lines(things: str) -> StageReport:
    """Prints the end of each stage, and a line every ten seconds on the way."""
    last = time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            print(f"{stage}: {done} of {total} {things}", file=sys.stderr, flush=True)

    return report
