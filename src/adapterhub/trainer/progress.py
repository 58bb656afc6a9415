"""What the person at the terminal sees while a run goes on."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress


class TrainingProgress(Protocol):
    """Receives the state of a run, step by step; a context manager around the training loop."""

    def __enter__(self) -> TrainingProgress: ...

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def step(self, done: int, total: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """One optimizer step is done; ``loss`` in nats a token."""

    def held_out(self, step: int, loss: float) -> None:
        """The held-out loss was measured after ``step``, in nats a token."""


def training_progress() -> TrainingProgress:
    """A live bar on a terminal, a plain line every few seconds elsewhere; both on stderr."""
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()


class LiveProgress:
    """A rich progress bar with loss, tokens/s and time left."""

    _progress: Progress

    def __enter__(self) -> LiveProgress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=None, state="")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, done: int, total: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        self._progress.update(
            self._task,
            completed=done,
            total=total,
            description=f"step {done}/{total}",
            state=f"loss {loss:.4f}  {tokens_per_second:,.0f} tok/s  {duration(seconds_left)} left",
        )

    def held_out(self, step: int, loss: float) -> None:
        self._progress.console.print(f"step {step}: held-out loss {loss:.4f}")


class PlainProgress:
    """A line at the first step, the last, and every ten seconds between."""

    _INTERVAL = 10.0

    def __enter__(self) -> PlainProgress:
        self._last = -self._INTERVAL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None:
        sys.stderr.flush()

    def step(self, done: int, total: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        now = time.monotonic()
        if done == total or now - self._last >= self._INTERVAL:
            self._last = now
            speed = f"{tokens_per_second:,.0f} tok/s  {duration(seconds_left)} left"
            print(f"step {done}/{total}  loss {loss:.4f}  {speed}", file=sys.stderr, flush=True)

    def held_out(self, step: int, loss: float) -> None:
        print(f"step {step}: held-out loss {loss:.4f}", file=sys.stderr, flush=True)


class SilentProgress:
    """Says nothing: for the processes of a run beside the first."""

    def __enter__(self) -> SilentProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None:
        pass

    def step(self, done: int, total: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        pass

    def held_out(self, step: int, loss: float) -> None:
        pass


def duration(seconds: float) -> str:
    """``75.2`` -> ``1:15``; hours are shown when there are any."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
