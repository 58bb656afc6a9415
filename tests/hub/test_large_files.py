"""Large files from a real Hub: resumed inside the file, by later processes too, and always checked."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from adapterhub.errors import AdapterHubError, HubError
from adapterhub.hub import client as client_module
from adapterhub.hub import flushing
from adapterhub.hub.client import connect, list_tags, resolve
from adapterhub.hub.contents import Content
from adapterhub.hub.downloads import download_contents
from adapterhub.hub.pull import pull
from adapterhub.hub.push import push
from adapterhub.hub.refs import parse_ref
from adapterhub.packaging.files import list_files
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.release import Release

LARGE = 33 << 20


class Line:
    """A proxy before a Hub that counts what the Hub sends, and can break off or spoil the answers."""

    def __init__(self, target: str) -> None:
        there = urlsplit(target)
        self._target = (there.hostname, there.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.fetched = 0
        self.break_after: int | None = None
        """Bytes after which the next connection is reset, once."""
        self.flip_at: int | None = None
        """Which of the bytes to come is altered, once."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                hub = socket.create_connection(self._target)
                for source, target, answers in ((client, hub, False), (hub, client, True)):
                    threading.Thread(
                        target=self._forward, args=(source, target, answers), daemon=True
                    ).start()

    def _forward(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(self._pass(data) if answers else data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _pass(self, data: bytes) -> bytes:
        before, self.fetched = self.fetched, self.fetched + len(data)
        if self.flip_at is not None and before <= self.flip_at < self.fetched:
            altered = bytearray(data)
            altered[self.flip_at - before] ^= 1
            data, self.flip_at = bytes(altered), None
        if self.break_after is not None and self.fetched >= self.break_after:
            self.break_after = None
            raise ConnectionResetError
        return data


@pytest.fixture
def line(hub_server) -> Iterator[Line]:
    proxy = Line(hub_server.url)
    yield proxy
    proxy.close()


@pytest.fixture
def published(
    hub_server, tiny_release: Path, hub_cache: Path, request: pytest.FixtureRequest
) -> tuple[str, Path]:
    """A release with one large file of random bytes on the Hub -> its name, its folder; an empty cache."""
    manifest = Manifest.read(tiny_release).model_copy(update={"kind": "merged"})
    (tiny_release / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    release = Release.open(tiny_release).with_files({"weights.safetensors": os.urandom(LARGE)})
    repo = f"ada/large-{sha256(request.node.nodeid.encode()).hexdigest()[:12]}"
    push(release, repo, endpoint=hub_server.url, token=hub_server.token)
    shutil.rmtree(hub_cache, ignore_errors=True)
    return repo, release.path


def test_a_push_tells_the_bytes_of_large_files(hub_server, published, tmp_path) -> None:
    repo, folder = published
    (folder / "weights.safetensors").unlink()
    manifest = Manifest.read(folder)
    files = {name: entry for name, entry in manifest.files.items() if name != "weights.safetensors"}
    draft = manifest.model_copy(update={"version": "0.2.0", "files": files})
    (folder / MANIFEST_NAME).write_bytes(draft.to_bytes())
    small, large = [], []
    send = {"endpoint": hub_server.url, "token": hub_server.token}
    push(Release.open(folder), repo, **send, progress=lambda *told: small.append(told))
    assert small == []
    (folder / MANIFEST_NAME).write_bytes(draft.model_copy(update={"version": "0.3.0"}).to_bytes())
    sizes = {"weights.safetensors": 5_000_000, "more.safetensors": 2_000_000}
    release = Release.open(folder).with_files({name: os.urandom(size) for name, size in sizes.items()})
    push(release, repo, **send, progress=lambda *told: large.append(told))
    assert {total for _, total in large} == {7_000_000}
    assert [done for done, _ in large] == sorted({done for done, _ in large})
    assert large[-1][0] == 7_000_000


@pytest.fixture
def check(published, hub_cache: Path, line: Line) -> Callable[[], None]:
    """Pull, and hold the result to what was pushed: byte-identical, nothing left over."""
    repo, folder = published

    def run() -> None:
        pulled = pull(repo, endpoint=line.url).release.path
        assert {name: (pulled / name).read_bytes() for name in list_files(pulled)} == {
            name: (folder / name).read_bytes() for name in list_files(folder)
        }
        assert not [*hub_cache.rglob("*.part"), *hub_cache.rglob("*.incomplete"), *hub_cache.rglob("*.tmp")]

    return run


def part_of(hub_cache: Path) -> Path:
    (part,) = hub_cache.rglob("*.part")
    return part


def start_pull(repo: str, line: Line, hub_cache: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HF_ENDPOINT": line.url, "HF_HUB_CACHE": str(hub_cache)}
    return subprocess.Popen(
        [sys.executable, "-m", "adapterhub", "pull", repo],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_killed_pull_goes_on_inside_the_file(published, line, hub_cache, check) -> None:
    process = start_pull(published[0], line, hub_cache)
    while line.fetched < 0.7 * LARGE and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = part_of(hub_cache).stat().st_size
    assert kept > LARGE // 2
    line.fetched = 0
    check()
    assert line.fetched < LARGE - kept + (6 << 20)  # the tokenizer and other small files come in this run too


def test_a_connection_that_breaks_is_gone_on_with(published, line, check) -> None:
    line.break_after = LARGE // 2
    check()
    assert line.fetched < 1.25 * LARGE


def test_flipped_bytes_are_found_and_fetched_anew(published, line, check) -> None:
    line.flip_at = LARGE // 2
    check()
    assert line.fetched > 1.9 * LARGE


def test_a_file_is_written_out_while_it_comes(published, line, hub_cache, check, monkeypatch) -> None:
    """And a disk that fails then is an error, after which the next run goes on."""
    flushed, real = [], flushing._write_out

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(flushing, "_AT_ONCE", 4 << 20)
    monkeypatch.setattr(flushing, "_write_out", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        pull(published[0], endpoint=line.url)
    assert not [path for path in hub_cache.rglob("blobs/*") if path.stat().st_size == LARGE]
    monkeypatch.setattr(flushing, "_write_out", lambda fd: flushed.append(os.fstat(fd).st_size) or real(fd))
    check()
    assert 0 < flushed[0] < LARGE


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * (LARGE // 2),
        *(pytest.param(it, marks=pytest.mark.slow) for it in (b"\0" * LARGE, b"\0" * (LARGE + 9), b"")),
    ],
)
def test_a_part_with_other_bytes_is_not_believed(published, hub_cache, check, content: bytes) -> None:
    digest = sha256((published[1] / "weights.safetensors").read_bytes()).hexdigest()
    blobs = hub_cache / f"models--{published[0].replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest}.part").write_bytes(content)
    check()


def test_content_that_stays_wrong_is_an_error_and_leaves_nothing(published, line, hub_cache) -> None:
    client, ref = connect(line.url), parse_ref(f"{published[0]}@0.1.0")
    wrong = Content(LARGE, sha256="0" * 64)
    with pytest.raises(HubError, match=r"weights\.safetensors arrived twice with another content"):
        download_contents(client, ref, resolve(client, ref).commit, {"weights.safetensors": wrong})
    assert not [*hub_cache.rglob("*.part"), *hub_cache.rglob("blobs/*")]


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    published, line, hub_cache, tmp_path, monkeypatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=LARGE // 2))
    with pytest.raises(AdapterHubError, match="its disk has") as error:
        pull(published[0], endpoint=line.url)
    assert "HF_HOME" in error.value.fix
    assert line.fetched < LARGE // 4
    out = tmp_path / "elsewhere" / "out"
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: real(path)._replace(free=LARGE // 2 if path == tmp_path else 9 * LARGE),
    )
    with pytest.raises(AdapterHubError, match=f"{out}, and its disk has"):
        pull(published[0], endpoint=line.url, out=out)
    assert line.fetched < LARGE // 4


def test_a_second_pull_makes_two_requests_and_reads_no_file_again(published, hub_server, monkeypatch) -> None:
    import httpx2

    from adapterhub.packaging import release

    first = pull(published[0], endpoint=hub_server.url)
    asked, hashed = [], []
    send = httpx2.Client.send
    monkeypatch.setattr(
        httpx2.Client, "send", lambda self, it, **o: (asked.append(it.url), send(self, it, **o))[1]
    )
    monkeypatch.setattr(release, "sha256_file", lambda path: hashed.append(path))
    assert pull(published[0], endpoint=hub_server.url) == first
    assert len(asked) == 2
    assert hashed == []


def test_a_hub_that_freezes_is_an_error(monkeypatch) -> None:
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(client_module, "_SILENCE", 0.3)
    close_session()
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            api = connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
            with pytest.raises(HubError, match="no answer from"):
                list_tags(api, parse_ref("ada/orders"))  # huggingface_hub gives this call no time limit
    finally:
        close_session()
