"""Rows published over a line and onto a disk that fail: the next run completes, with the same release."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from client_runs import publish
from fault_proxy import FaultProxy

from adapterhub.errors import AdapterHubError
from adapterhub.hub.client import connect
from adapterhub.hub.pull import pull
from adapterhub.hub.refs import parse_ref
from adapterhub.hub.snapshots import list_files as list_on_hub
from adapterhub.packaging.files import list_files
from adapterhub.packaging.keys import generate_key

pytestmark = pytest.mark.usefixtures("impatient")

REQUESTS = 12  # of a first push, at least


class Publishing:
    """Rows pushed to new repositories, as `push --type dataset --key` does it."""

    def __init__(self, hub, line: FaultProxy, rows: Path, cache: Path) -> None:
        self.hub, self.line, self.rows, self.cache = hub, line, rows, cache
        self.repo, self._numbers = "", count()
        self.new_repo()
        self.run()
        self.data = self.check(complete=True)
        """The files of rows that every run must come to."""

    def new_repo(self) -> None:
        self.line.clear()
        self.repo = f"ada/publishing-{self.line.port}-{next(self._numbers)}"

    @property
    def arguments(self) -> tuple[str, ...]:
        return (str(self.rows), self.repo, self.line.url, self.hub.token, str(self.cache))

    def run(self) -> None:
        publish(*self.arguments)

    def check(self, *, complete: bool) -> dict[str, bytes]:
        """What has a tag is one whole release, and nothing lies about -> its rows."""
        api = connect(self.hub.url, self.hub.token)
        is_there = api.repo_exists(self.repo, repo_type="dataset")
        refs = api.list_repo_refs(self.repo, repo_type="dataset").tags if is_there else []
        tags = {tag.name: tag.target_commit for tag in refs}  # a name too may have been altered on its way
        assert "v1.0.0" in tags or not complete
        assert not complete or not [*self.cache.rglob(".adapterhub/push/*"), *self.cache.rglob("*.tmp")]
        if not tags:
            return {}
        (commit,) = set(tags.values())
        out = self.rows.parent / self.repo / f"complete-{complete}"
        pulled = pull(
            f"{self.repo}@{commit}",
            endpoint=self.hub.url,
            token=self.hub.token,
            repo_type="dataset",
            out=out,
            keys=[self.rows.parent / "adapterhub.pub"],
            require_signed=True,
        )
        assert pulled.release.manifest.version == "1.0.0"
        there = list_on_hub(api, parse_ref(self.repo), commit, "dataset")
        assert set(there) - {".gitattributes"} == set(list_files(out))
        assert len(api.list_repo_commits(self.repo, repo_type="dataset")) == 2
        return {name: (out / name).read_bytes() for name in pulled.files if name.startswith("data/")}


@pytest.fixture
def start(hub_server, write_jsonl, tmp_path: Path, hub_cache: Path) -> Iterator[Callable[..., Publishing]]:
    """``start(cache)`` has published 40 rows once, over a line that can fail -> how to do it again."""
    generate_key(tmp_path)
    content = [{"prompt": f"{number} apples, please", "completion": str(number)} for number in range(40)]
    rows = write_jsonl(tmp_path / "rows.jsonl", content)
    with FaultProxy(hub_server.url) as line:
        yield lambda cache=hub_cache: Publishing(hub_server, line, rows, cache)


@pytest.mark.slow
@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("fault", ["reset", "lost answer", "503", "truncated", "flipped request", "revoked"])
def test_every_request_of_rows_being_published(start, fault, forever) -> None:
    publishing = start()
    for at in count(1):
        publishing.new_repo()
        injected = publishing.line.inject(fault, at, forever=forever)
        with suppress(AdapterHubError):
            publishing.run()
        publishing.check(complete=False)
        publishing.line.clear()
        publishing.run()
        assert publishing.check(complete=True) == publishing.data
        if not injected.struck:
            break
    assert at > REQUESTS


@pytest.mark.slow
def test_a_disk_that_fills_up_while_rows_are_published(start, small_disk: Path) -> None:
    ballast, cache = small_disk / "ballast", small_disk / "hub"
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    publishing = start(cache)
    publishing.new_repo()
    shutil.rmtree(cache)
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 12_000))
    with pytest.raises(OSError, match="No space left"):
        publishing.run()
    publishing.check(complete=False)
    assert not [*cache.rglob("*.parquet")]
    ballast.unlink()
    publishing.run()
    assert publishing.check(complete=True) == publishing.data


@pytest.mark.slow
def test_publishing_killed_at_fifty_moments(start) -> None:
    publishing = start()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["adapterhub.hub.publishing", "pyarrow.parquet", "huggingface_hub.hf_api"]
    )
    chance = random.Random(5)

    def begin() -> multiprocessing.process.BaseProcess:
        publishing.new_repo()
        process = processes.Process(target=publish, args=publishing.arguments)
        process.start()
        return process

    durations = []
    for _ in range(3):
        began = time.perf_counter()
        process = begin()
        process.join()
        assert process.exitcode == 0
        durations.append(time.perf_counter() - began)
    killed = 0
    for _ in range(50):
        process = begin()
        process.join(chance.uniform(0, min(durations)))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        publishing.check(complete=False)
        publishing.run()
        assert publishing.check(complete=True) == publishing.data
    assert killed > 15  # the others were done before
