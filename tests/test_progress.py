"""What a transfer shows where there is no terminal, and on one."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from adapterhub.commands import progress
from adapterhub.commands.progress import in_units, show_transfer


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 KB"), (123_456, "123 KB"), (1_500_000_000, "1.5 GB")],
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert in_units(size) == words


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch) -> None:
    now = iter(range(0, 100, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with show_transfer("uploading") as tell:
        for done in range(0, 700_000_000, 100_000_000):
            tell(done, 600_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "uploading: 300 MB of 600 MB, 25.0 MB/s, 0:12 left",
        "uploading: 600 MB of 600 MB, 25.0 MB/s",
    ]
    with show_transfer("uploading", quiet=True) as tell:
        tell(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_rate_and_time_left() -> None:
    program = (
        "from adapterhub.commands.progress import show_transfer\nimport time\n"
        "with show_transfer('uploading') as tell:\n"
        "    for done in range(0, 60_000_001, 6_000_000):\n"
        "        tell(done, 60_000_000); time.sleep(0.02)\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program], stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except OSError:  # the other end is closed: that is how Linux says it
            pass
    os.close(ours)
    assert process.returncode == 0
    assert b"60.0/60.0 MB" in shown
    assert b"MB/s" in shown
    assert b"uploading" in shown
    assert b"0:00:0" in shown
