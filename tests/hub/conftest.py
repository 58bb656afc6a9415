"""A real embedded Hub in a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class HubServer:
    """A running Hub and the account that may write to it."""

    url: str
    token: str
    user: str
    root: Path
    process: subprocess.Popen[str]

    def move_tag(self, repo: str, tag: str, commit: str) -> None:
        """What this Hub refuses, and others let a repository's owner do."""
        (self.root / "models" / f"{repo}.git" / "refs" / "tags" / tag).write_text(f"{commit}\n")


@contextlib.contextmanager
def running_hub(
    root: Path,
    *options: str,
    user: str = "ada",
    token: str = "secret-token-of-ada",
    stderr: int | None = None,
) -> Iterator[HubServer]:
    """Start ``adapterhub hub serve ROOT --port 0 …``, wait for its first line, and stop it at the end."""
    account = ["--user", user, "--token", token] if user else []
    process = subprocess.Popen(
        [sys.executable, "-m", "adapterhub", "hub", "serve", str(root), "--port", "0", *account, *options],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        assert first.startswith("listening on http://127.0.0.1:"), first
        yield HubServer(first.removeprefix("listening on ").strip(), token, user, root, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with the user ``ada``, shared by the session's tests: each uses a repository name of its own."""
    with running_hub(tmp_path_factory.mktemp("hub") / "root") as server:
        yield server


@pytest.fixture(scope="session")
def _carded_template(_release_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from adapterhub.cards.card import read_card
    from adapterhub.cards.rendering import render_files
    from adapterhub.packaging.release import Release

    path = tmp_path_factory.mktemp("carded") / _release_template.name
    shutil.copytree(_release_template, path)
    Release.open(path).with_files(render_files(read_card(Release.open(path))))
    return path


@pytest.fixture
def carded_release(_carded_template: Path, tmp_path: Path) -> Path:
    """A fresh copy of ``tiny_release`` with its card, as ``adapterhub push`` wants it."""
    path = tmp_path / "carded" / _carded_template.name
    shutil.copytree(_carded_template, path)
    return path


@pytest.fixture(scope="session")
def start_hub() -> Callable[..., contextlib.AbstractContextManager[HubServer]]:
    """``with start_hub(root, *options, user=…, token=…) as server``: a Hub of one's own (open: user="")."""
    return running_hub


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two tries."""
    real = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: real(min(seconds, 0.002)))
    monkeypatch.setattr("adapterhub.hub.downloads._PAUSE", 0.001)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 KB, less than a release needs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a disk here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)
