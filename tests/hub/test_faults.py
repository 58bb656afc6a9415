"""Push and pull over a line, from a Hub and onto a disk that fail: the next run completes, byte for byte."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest
from client_runs import pull_release, push_release
from fault_proxy import FAULTS, FaultProxy, Kind
from huggingface_hub import constants

from adapterhub.errors import AdapterHubError, HubError
from adapterhub.hub.changes import repo_type_of
from adapterhub.hub.client import RepoType, connect
from adapterhub.hub.pull import pull
from adapterhub.hub.push import push
from adapterhub.hub.refs import parse_ref
from adapterhub.hub.snapshots import list_files as list_on_hub
from adapterhub.packaging.files import list_files
from adapterhub.packaging.manifest import Manifest
from adapterhub.packaging.release import Release, new_release

pytestmark = pytest.mark.usefixtures("impatient")

_NUMBERS = count()
SMALL_PUSH = 12  # requests of a first push, at least; a test holds it
SMALL_PULL = 12


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Release]:
    """By kind: a release of two large files, a card and evidence."""
    found = {}
    for kind, endings in (("adapter", "safetensors"), ("dataset", "parquet")):
        path = tmp_path_factory.mktemp("release") / "small"
        draft = Manifest(name="small", version="0.1.0", created=datetime(2026, 1, 2, tzinfo=UTC), kind=kind)
        with new_release(path, draft) as staging:
            (staging / "evidence").mkdir()
            (staging / "evidence" / "scores.json").write_text('{"rows": 3}')
            (staging / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Small\n")
            (staging / f"large.{endings}").write_bytes(os.urandom(150_000))
            (staging / f"small.{endings}").write_bytes(os.urandom(3_000))
        found[kind] = Release.open(path)
    return found


@dataclass
class Scene:
    """A Hub, a line to it that can fail, and a client."""

    hub: str
    token: str
    line: FaultProxy
    release: Release
    cache: Path
    repo: str = ""

    @property
    def repo_type(self) -> RepoType:
        return repo_type_of(self.release)

    def new_repo(self) -> None:
        self.repo = f"ada/faults-{os.getpid()}-{next(_NUMBERS)}"

    def push(self, endpoint: str | None = None) -> None:
        push(self.release, self.repo, endpoint=endpoint or self.line.url, token=self.token)

    def pull(self) -> None:
        pull(self.repo, endpoint=self.line.url, token=self.token, repo_type=self.repo_type)

    def check_hub(self, *, complete: bool) -> None:
        """No version tag is on anything but the whole release; ``complete``: it is there."""
        ref, api = parse_ref(self.repo), connect(self.hub, self.token)
        tags = (
            {it.name: it.target_commit for it in api.list_repo_refs(self.repo, repo_type=self.repo_type).tags}
            if api.repo_exists(self.repo, repo_type=self.repo_type)
            else {}
        )
        assert "v0.1.0" in tags or not complete
        for commit in tags.values():
            there = list_on_hub(api, ref, commit, self.repo_type)
            assert set(there) - {".gitattributes"} == set(list_files(self.release.path))
            for name in list_files(self.release.path):
                assert there[name].is_content_of(self.release.path / name)

    def check_cache(self, *, complete: bool) -> None:
        """What stands under a final name is whole; ``complete``: all is there, and no temporary is left."""
        folders = list(self.cache.glob("*s--*/snapshots/*"))
        for folder in folders:
            for name in list_files(folder):
                found, right = (folder / name).read_bytes(), (self.release.path / name).read_bytes()
                assert len(found) == len(right), f"{name} is a part"
                assert found == right or not complete, f"{name} is damaged"
        if complete:
            assert any(set(list_files(folder)) == set(list_files(self.release.path)) for folder in folders)
            assert not leftovers(self.cache)


def leftovers(cache: Path) -> list[str]:
    """Files of a cache that are neither content, nor a name for it, nor a note or a lock."""
    endings = (".part", ".incomplete", ".tmp")
    return [name for name in list_files(cache) if name.endswith(endings) or "/tmp_" in name]


@pytest.fixture
def kind() -> str:
    """What is pushed and pulled; tests say otherwise by a parameter."""
    return "adapter"


@pytest.fixture
def scene(hub_server, releases: dict[str, Release], kind: str, hub_cache: Path) -> Iterator[Scene]:
    with FaultProxy(hub_server.url) as line:
        it = Scene(hub_server.url, hub_server.token, line, releases[kind], hub_cache)
        it.new_repo()
        yield it


@pytest.fixture
def redirected(hub_server, releases: dict[str, Release], kind: str, hub_cache: Path) -> Iterator[Scene]:
    """Downloads go by signed addresses, as on the public Hub."""
    with FaultProxy(hub_server.url, redirecting=True) as line:
        it = Scene(hub_server.url, hub_server.token, line, releases[kind], hub_cache)
        it.new_repo()
        yield it


def break_push(scene: Scene, kind: Kind, at: int, forever: bool) -> bool:
    """A push that something happens to, then one that nothing does -> whether it happened."""
    scene.new_repo()
    scene.line.clear()
    fault = scene.line.inject(kind, at, forever=forever)
    with suppress(AdapterHubError):
        scene.push()
    scene.check_hub(complete=False)
    scene.line.clear()
    scene.push()
    scene.check_hub(complete=True)
    return fault.struck > 0


def break_pull(scene: Scene, kind: Kind, at: int, forever: bool, match: str = "") -> bool:
    shutil.rmtree(scene.cache, ignore_errors=True)
    scene.line.clear()
    fault = scene.line.inject(kind, at, match=match, forever=forever)
    with suppress(AdapterHubError):
        scene.pull()
    scene.check_cache(complete=False)
    scene.line.clear()
    scene.pull()
    scene.check_cache(complete=True)
    return fault.struck > 0


@pytest.mark.parametrize(
    ("kind", "fault", "at", "forever"),
    [
        ("adapter", "reset", 5, True),
        ("dataset", "lost answer", 9, False),
        ("adapter", "503", 3, False),
        ("adapter", "flipped request", 8, False),
    ],
)
def test_a_push_that_broke_is_finished_by_the_next(scene, fault, at, forever) -> None:
    assert break_push(scene, fault, at, forever)


@pytest.mark.parametrize(
    ("kind", "fault", "at", "forever"),
    [
        ("adapter", "reset", 6, True),
        ("dataset", "truncated", 7, False),
        ("adapter", "429", 2, False),
        ("adapter", "flipped answer", 6, False),
    ],
)
def test_a_pull_that_broke_is_finished_by_the_next(scene, fault, at, forever) -> None:
    scene.push(scene.hub)
    assert break_pull(scene, fault, at, forever)


def test_a_name_that_cannot_be_looked_up(scene, monkeypatch) -> None:
    scene.push(scene.hub)
    with failing_lookups(scene.line.port, 1, monkeypatch), pytest.raises(HubError, match="no answer from"):
        scene.pull()
    scene.pull()
    scene.check_cache(complete=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "dataset"])
@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_of_a_push(scene, fault, forever) -> None:
    at = 1
    while break_push(scene, fault, at, forever):
        at += 1
    assert at > SMALL_PUSH


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "dataset"])
@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_of_a_pull(redirected, fault, forever) -> None:
    redirected.push(redirected.hub)
    at = 1
    while break_pull(redirected, fault, at, forever):
        at += 1
    assert at > SMALL_PULL


@contextmanager
def failing_lookups(port: int, at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """From the ``at``-th lookup of the line's name on there is no name service; yields the lookups."""
    real, seen = socket.getaddrinfo, []

    def look_up(host, asked, *args, **options):
        if asked == port:
            seen.append(port)
            if len(seen) >= at:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real(host, asked, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up)
        yield seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "dataset"])
@pytest.mark.parametrize("way", ["push", "pull"])
def test_names_that_cannot_be_looked_up_from_some_moment_on(
    hub_server, releases, kind, way, hub_cache, monkeypatch
):
    with FaultProxy(hub_server.url, closing=True) as line:
        scene = Scene(hub_server.url, hub_server.token, line, releases[kind], hub_cache)
        for at in count(1):
            scene.new_repo()
            if way == "pull":
                scene.push(scene.hub)
                shutil.rmtree(hub_cache, ignore_errors=True)
            act = scene.push if way == "push" else scene.pull
            with failing_lookups(line.port, at, monkeypatch) as seen, suppress(AdapterHubError):
                act()
            scene.check_hub(complete=False)
            scene.check_cache(complete=False)
            act()
            scene.check_hub(complete=True)
            if way == "pull":
                scene.check_cache(complete=True)
            if len(seen) < at:
                break
        assert at > 5


@pytest.mark.parametrize("kind", ["adapter", "dataset"])
def test_a_disk_that_fills_up_during_a_pull(scene, small_disk: Path, monkeypatch) -> None:
    scene.push(scene.hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_disk))
    with pytest.raises(AdapterHubError, match="its disk has"):
        scene.pull()
    scene.cache = small_disk
    with monkeypatch.context() as patch:  # somebody else fills it after it was looked at
        patch.setattr("adapterhub.hub.snapshots.check_space", lambda *_: None)
        with pytest.raises(OSError, match="No space left"):
            scene.pull()
    scene.check_cache(complete=False)
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    scene.pull()
    scene.check_cache(complete=True)


@pytest.mark.parametrize("kind", ["adapter", "dataset"])
def test_a_hub_whose_disk_is_full(start_hub, releases, kind, small_disk: Path, hub_cache: Path) -> None:
    with start_hub(small_disk / "root") as hub, FaultProxy(hub.url) as line:
        scene = Scene(hub.url, hub.token, line, releases[kind], hub_cache)
        scene.new_repo()
        with pytest.raises(HubError, match="disk is full"):
            scene.push()
        scene.check_hub(complete=False)
        subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
        scene.push()
        scene.check_hub(complete=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "dataset"])
@pytest.mark.parametrize("way", ["push", "pull"])
def test_clients_killed_at_fifty_moments(scene, way) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["adapterhub.hub.push", "adapterhub.hub.pull", "huggingface_hub.hf_api"])
    chance = random.Random(5)
    scene.push(scene.hub)
    if way == "push":
        act, target = scene.push, push_release
    else:
        act, target = scene.pull, pull_release

    def start() -> multiprocessing.process.BaseProcess:
        where = (scene.line.url, scene.token)
        given = (
            (str(scene.release.path), scene.repo, *where)
            if way == "push"
            else (scene.repo, *where, scene.repo_type, str(scene.cache))
        )
        process = processes.Process(target=target, args=given)
        process.start()
        return process

    durations = []
    for _ in range(3):
        fresh(scene, way)
        began = time.perf_counter()
        process = start()
        process.join()
        assert process.exitcode == 0
        durations.append(time.perf_counter() - began)
    killed = 0
    for _ in range(50):
        fresh(scene, way)
        process = start()
        process.join(chance.uniform(0, min(durations)))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        scene.check_hub(complete=False)
        scene.check_cache(complete=False)
        act()
        scene.check_hub(complete=True)
        if way == "pull":
            scene.check_cache(complete=True)
    assert killed > 15  # the others were done before


def fresh(scene: Scene, way: str) -> None:
    """Nothing is there yet of what the next run is to make."""
    if way == "push":
        scene.new_repo()
    shutil.rmtree(scene.cache, ignore_errors=True)
