"""What a run shows: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from adapterhub.trainer.progress import PlainProgress, duration

SHOW = """
from adapterhub.trainer.progress import training_progress
with training_progress() as progress:
    import time
    time.sleep(0.3)
    progress.held_out(0, 2.5)
    for step in range(1, 4):
        progress.step(step, 3, 1.25, 1234.5, 61.0)
    time.sleep(0.3)
"""


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", SHOW], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())  # without colours and cursor moves
    for part in (
        "starting",
        "step 0: held-out loss 2.5000",
        "step 3/3",
        "loss 1.2500",
        "1,234 tok/s",
        "1:01 left",
    ):
        assert part in text


def test_anything_else_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainProgress() as progress:
        for step in range(1, 101):
            progress.step(step, 100, 0.5, 200.0, 100.0 - step)
        progress.held_out(100, 0.25)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step 1/100  loss 0.5000  200 tok/s  1:39 left",
        "step 100/100  loss 0.5000  200 tok/s  0:00 left",
        "step 100: held-out loss 0.2500",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (3661, "1:01:01"), (-3, "0:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
