"""Large files from a Hub: a download that was cut off, even by a crash, goes on where it stopped.

huggingface_hub drops what a process did not finish. Here the bytes go to ``<sha256>.part`` beside the blobs
of the Hugging Face cache, which a later run continues with a ranged request; only a file whose sha256 is the
one asked for gets its final name, and is linked into the commit's folder as huggingface_hub does it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from adapterhub.errors import AdapterHubError, HubError
from adapterhub.hub.client import RepoType, hub_errors, repo_cache
from adapterhub.hub.refs import Ref

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

LARGE: Final = 32 << 20
"""Bytes above which a file is downloaded here; smaller ones are left to huggingface_hub."""
_CHUNK: Final = 1 << 20
_UNHASHED: Final = 16  # chunks that may wait for the thread that hashes
_TRIES: Final = 5  # one after another, without a single new byte
_AT_ONCE: Final = 4  # files
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


@dataclass(frozen=True)
class Content:
    """What a file must turn out to be."""

    sha256: str
    """64 hex digits."""
    size: int
    """Bytes."""


def download_large(
    api: HfApi, ref: Ref, commit: str, files: Mapping[str, Content], repo_type: RepoType = "model"
) -> set[str]:
    """Bring ``files`` of a commit into the cache, several at once; return those found there, or fetched.

    A blob that is in the cache is taken as it is; what is fetched is checked by its sha256. A file that the
    commit has not is left out. What has arrived stays for the next run when this one fails. Raises HubError
    for content that is not what was asked for, RefError, AuthError; OSError for a full disk.
    """
    from huggingface_hub.utils import tqdm

    cache = repo_cache(ref.repo, repo_type)
    (cache / "blobs").mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    with (
        hub_errors(api, ref),
        tqdm(
            total=sum(content.size for content in files.values()),
            desc=f"{len(files)} large files" if len(files) > 1 else next(iter(files)),
            unit="B",
            unit_scale=True,
            name="adapterhub.download",
        ) as bar,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        downloads = [
            _Download(api, ref, commit, name, content, repo_type, cache, bar, stop)
            for name, content in files.items()
        ]
        try:
            tasks = {download.name: pool.submit(download.run) for download in downloads}
            wait(tasks.values(), return_when=FIRST_EXCEPTION)
            for task in tasks.values():
                if task.done():
                    task.result()  # the failure that ended the wait comes first, not the file named first
            return {name for name, task in tasks.items() if task.result()}
        except BaseException:  # an interrupt too: the threads end at their next chunk
            stop.set()
            raise


def check_space(folder: Path, wanted: int) -> None:
    """Raise AdapterHubError when the disk that ``folder`` is to lie on has no ``wanted`` bytes left."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise AdapterHubError(
            f"{wanted} bytes are still to be downloaded into {folder}, and its disk has {free} left",
            "make room on that disk, or let HF_HOME name a folder on another; what has arrived is kept",
        )


def missing_bytes(cache: Path, content: Content) -> int:
    """How much of a file is still to come into the folder ``cache`` of a repository."""
    blob = cache / "blobs" / content.sha256
    if blob.is_file():
        return 0
    part = blob.with_suffix(".part")
    return max(content.size - (part.stat().st_size if part.is_file() else 0), 0)


@dataclass(frozen=True)
class _Download:
    """One file on its way."""

    api: HfApi
    ref: Ref
    commit: str
    name: str
    content: Content
    repo_type: RepoType
    cache: Path
    bar: Any
    stop: threading.Event

    def run(self) -> bool:
        """Fetch it and link it; False when the commit has no such file."""
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import WeakFileLock

        blob = self.cache / "blobs" / self.content.sha256
        lock = self.cache.parent / ".locks" / self.cache.name / f"{blob.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # the one that huggingface_hub takes for this blob
            if blob.is_file():
                self.bar.update(self.content.size)
            else:
                try:
                    self._fill(blob.with_suffix(".part"))
                except EntryNotFoundError:
                    return False
                blob.with_suffix(".part").replace(blob)
        _link(blob, self.cache / "snapshots" / self.commit / self.name)
        return True

    def _fill(self, part: Path) -> None:
        """Complete ``part``; what was there may be bad, so one that comes out wrong is fetched once more."""
        for _ in range(2):
            with part.open("a+b") as file:
                digest = self._append(file)
            if digest == self.content.sha256:
                return
            self.bar.update(-part.stat().st_size)
            part.unlink()
        raise HubError(
            f"{self.ref}: {self.name} arrived twice with another content than is listed "
            f"(sha256 {self.content.sha256[:12]}…)",
            "try again; if it stays so, a proxy on the way or the Hub alters it: tell its owner",
        )

    def _append(self, file: BinaryIO) -> str:
        """Fetch what is missing of ``file``, over as many connections as it takes -> its sha256."""
        import httpx2

        digest = _Digest()
        file.seek(0)
        while chunk := file.read(_CHUNK):
            digest.add(chunk)
        self.bar.update(file.tell())
        tries = 0
        while (start := file.tell()) < self.content.size and tries < _TRIES:
            failure: httpx2.TransportError | None = None
            try:
                digest = self._receive(file, digest)
            except httpx2.TransportError as err:
                failure = err
            if file.tell() > start:
                tries = 0
                continue
            tries += 1
            if failure is not None and tries == _TRIES:
                raise failure
            self._pause(2 ** (tries - 1))
        return digest.hexdigest()

    def _receive(self, file: BinaryIO, digest: _Digest) -> _Digest:
        """One request for the rest of ``file``."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        have = file.tell()
        headers = build_hf_headers(
            token=self.api.token,
            library_name=self.api.library_name,
            library_version=self.api.library_version,
        )
        headers |= {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        url = hf_hub_url(
            self.ref.repo,
            self.name,
            repo_type=self.repo_type,
            revision=self.commit,
            endpoint=self.api.endpoint,
        )
        with http_stream_backoff(
            "GET",
            url,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),  # they are met in _append, which goes on where it was
        ) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and have:  # a server without ranges: all over again
                self.bar.update(-have)
                file.truncate(0)
                file.seek(0)
                digest, have = _Digest(), 0
            self._check_range(response, have)
            for chunk in response.iter_raw(_CHUNK):
                self._check_running()
                if file.tell() + len(chunk) > self.content.size:
                    chunk = chunk[: self.content.size - file.tell()]  # its sha256 will tell
                file.write(chunk)
                digest.add(chunk)
                self.bar.update(len(chunk))
        return digest

    def _check_range(self, response: httpx2.Response, have: int) -> None:
        """Raise HubError for another part than was asked for, or a part of another file."""
        if response.status_code != 206:
            return
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or (int(found[1]), int(found[2])) != (have, self.content.size):
            raise HubError(
                f"{self.api.endpoint} answered with the wrong part of {self.name}: "
                f"{response.headers.get('Content-Range')!r}, not from {have} of {self.content.size}",
                "try again; if it stays so, tell who runs that Hub",
            )

    def _pause(self, seconds: float) -> None:
        self.stop.wait(seconds)
        self._check_running()

    def _check_running(self) -> None:
        if self.stop.is_set():
            raise InterruptedError


class _Digest:
    """The sha256 of bytes as they come, computed beside the thread that receives them."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def add(self, data: bytes) -> None:
        if len(self._waiting) >= _UNHASHED:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._sha256.update, data))

    def hexdigest(self) -> str:
        self._thread.shutdown(wait=True)
        return self._sha256.hexdigest()


def _link(blob: Path, pointer: Path) -> None:
    """Show a blob under its name in a commit's folder; where there are no links, move it there."""
    if pointer.is_file():  # another process was as fast
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    try:
        pointer.unlink(missing_ok=True)  # a link to a blob that is gone
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except FileExistsError:
        return
    except (NotImplementedError, PermissionError):
        blob.replace(pointer)
