"""Push and pull over a line, from a Hub and onto a disk that fail: the next run completes, byte for byte."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest
from fault_proxy import FAULTS, FaultProxy, Kind

from adapterhub.errors import AdapterHubError
from adapterhub.hub.client import connect
from adapterhub.hub.pull import pull
from adapterhub.hub.push import push
from adapterhub.hub.refs import parse_ref
from adapterhub.hub.snapshots import list_files as list_on_hub
from adapterhub.packaging.files import list_files
from adapterhub.packaging.manifest import Manifest
from adapterhub.packaging.release import Release, new_release

_NUMBERS = count()
SMALL_PUSH = 12  # requests of a first push, at least; a test holds it
SMALL_PULL = 12


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two tries."""
    real = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: real(min(seconds, 0.002)))
    monkeypatch.setattr("adapterhub.hub.downloads._PAUSE", 0.001)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A merged release of two weight files, a card and evidence."""
    path = tmp_path_factory.mktemp("release") / "small"
    draft = Manifest(name="small", version="0.1.0", created=datetime(2026, 1, 2, tzinfo=UTC), kind="merged")
    with new_release(path, draft) as staging:
        (staging / "evidence").mkdir()
        (staging / "evidence" / "scores.json").write_text('{"rows": 3}')
        (staging / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Small\n")
        (staging / "large.safetensors").write_bytes(os.urandom(150_000))
        (staging / "small.safetensors").write_bytes(os.urandom(3_000))
    return Release.open(path)


@dataclass
class Scene:
    """A Hub, a line to it that can fail, and a client."""

    hub: str
    token: str
    line: FaultProxy
    release: Release
    cache: Path
    repo: str = ""

    def new_repo(self) -> None:
        self.repo = f"ada/faults-{os.getpid()}-{next(_NUMBERS)}"

    def push(self, endpoint: str | None = None) -> None:
        push(self.release, self.repo, endpoint=endpoint or self.line.url, token=self.token)

    def pull(self) -> None:
        pull(self.repo, endpoint=self.line.url, token=self.token)

    def check_hub(self, *, complete: bool) -> None:
        """No version tag is on anything but the whole release; ``complete``: it is there."""
        ref, api = parse_ref(self.repo), connect(self.hub, self.token)
        tags = (
            {it.name: it.target_commit for it in api.list_repo_refs(self.repo).tags}
            if api.repo_exists(self.repo)
            else {}
        )
        assert "v0.1.0" in tags or not complete
        for commit in tags.values():
            there = list_on_hub(api, ref, commit)
            assert set(there) - {".gitattributes"} == set(list_files(self.release.path))
            for name in list_files(self.release.path):
                assert there[name].is_content_of(self.release.path / name)

    def check_cache(self, *, complete: bool) -> None:
        """What stands under a final name is whole; ``complete``: all is there, and no temporary is left."""
        folders = list(self.cache.glob("models--*/snapshots/*"))
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
def scene(hub_server, release: Release, hub_cache: Path) -> Iterator[Scene]:
    with FaultProxy(hub_server.url) as line:
        it = Scene(hub_server.url, hub_server.token, line, release, hub_cache)
        it.new_repo()
        yield it


@pytest.fixture
def redirected(hub_server, release: Release, hub_cache: Path) -> Iterator[Scene]:
    """Downloads go by signed addresses, as on the public Hub."""
    with FaultProxy(hub_server.url, redirecting=True) as line:
        it = Scene(hub_server.url, hub_server.token, line, release, hub_cache)
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
    ("kind", "at", "forever"),
    [("reset", 5, True), ("lost answer", 9, False), ("503", 3, False), ("flipped request", 8, False)],
)
def test_a_push_that_broke_is_finished_by_the_next(scene, kind, at, forever) -> None:
    assert break_push(scene, kind, at, forever)


@pytest.mark.parametrize(
    ("kind", "at", "forever"),
    [("reset", 6, True), ("truncated", 7, False), ("429", 2, False), ("flipped answer", 6, False)],
)
def test_a_pull_that_broke_is_finished_by_the_next(scene, kind, at, forever) -> None:
    scene.push(scene.hub)
    assert break_pull(scene, kind, at, forever)


@pytest.mark.slow
@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("kind", FAULTS)
def test_every_request_of_a_push(scene, kind, forever) -> None:
    at = 1
    while break_push(scene, kind, at, forever):
        at += 1
    assert at > SMALL_PUSH


@pytest.mark.slow
@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("kind", FAULTS)
def test_every_request_of_a_pull(redirected, kind, forever) -> None:
    redirected.push(redirected.hub)
    at = 1
    while break_pull(redirected, kind, at, forever):
        at += 1
    assert at > SMALL_PULL
