"""Files from a Hub: a download that was cut off, even by a crash, goes on where it stopped.

huggingface_hub drops what a process did not finish, and names what it fetched before anybody has checked it.
Here the bytes go to ``<digest>.part`` beside the blobs of the Hugging Face cache, which a later run continues
with a ranged request; only a file whose digest is the one asked for gets its final name, and is linked into
the commit's folder as huggingface_hub does it. One request a file, where huggingface_hub makes two.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from adapterhub.errors import AdapterHubError, HubError
from adapterhub.hub.client import RepoType, hub_errors, hub_headers, keep_bars_out_of_files, repo_cache
from adapterhub.hub.contents import Content, Digest
from adapterhub.hub.flushing import Flusher
from adapterhub.hub.refs import Ref
from adapterhub.hub.tally import Progress, Tally

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

_CHUNK: Final = 1 << 20
_TRIES: Final = 5  # one after another, without a single new byte
_PAUSE: Final = 1.0  # seconds before the second of them; twice as long before each further one
_AT_ONCE: Final = 8  # files
_WORTH_SHOWING: Final = 4 << 20  # bytes
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


def download_contents(
    api: HfApi,
    ref: Ref,
    commit: str,
    files: Mapping[str, Content],
    repo_type: RepoType = "model",
    progress: Progress | None = None,
) -> dict[str, str]:
    """Bring ``files`` of a commit into the cache, several at once; return the sha256 of those fetched.

    A blob that is in the cache is taken as it is; what is fetched is checked by its digest before it gets its
    name. A file that the commit has not is left out. What has arrived stays for the next run when this one
    fails. Without ``progress``, huggingface_hub's own bar is shown. Raises HubError for content that is not
    what was asked for, RefError, AuthError; OSError for a full disk.
    """
    cache = repo_cache(ref.repo, repo_type)
    (cache / "blobs").mkdir(parents=True, exist_ok=True)
    (cache.parent / ".locks" / cache.name).mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    with (
        hub_errors(api, ref),
        _shown(progress, files) as tally,
        ThreadPoolExecutor(min(_AT_ONCE, len(files))) as pool,
    ):
        downloads = [
            _Download(api, ref, commit, name, content, repo_type, cache, tally, stop)
            for name, content in sorted(files.items(), key=lambda item: -item[1].size)
        ]
        try:
            tasks = {download.name: pool.submit(download.run) for download in downloads}
            wait(tasks.values(), return_when=FIRST_EXCEPTION)
            for task in tasks.values():
                if task.done():
                    task.result()  # the failure that ended the wait comes first, not the file named first
            results = {name: task.result() for name, task in tasks.items()}
            return {name: sha256 for name, sha256 in results.items() if sha256 is not None}
        except BaseException:  # an interrupt too: the threads end at their next chunk
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def check_space(folder: Path, wanted: int, otherwise: str = "let HF_HOME name a folder on another") -> None:
    """Raise AdapterHubError when the disk that ``folder`` is to lie on has no ``wanted`` bytes left.

    ``otherwise`` says what to do without making room.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise AdapterHubError(
            f"{wanted} bytes are still to come into {folder}, and its disk has {free} left",
            f"make room on that disk, or {otherwise}; what has arrived is kept",
        )


def missing_bytes(cache: Path, content: Content) -> int:
    """How much of a file is still to come into the folder ``cache`` of a repository."""
    blob = cache / "blobs" / content.name
    if blob.is_file():
        return 0
    part = blob.with_suffix(".part")
    return max(content.size - (part.stat().st_size if part.is_file() else 0), 0)


@contextmanager
def _shown(progress: Progress | None, files: Mapping[str, Content]) -> Iterator[Tally]:
    """A count of the bytes of ``files`` that ``progress``, or else huggingface_hub's bar, is told of.

    Without ``progress`` there is no bar for so little that it is there before anybody has read it.
    """
    total = sum(content.size for content in files.values())
    if progress is not None or total < _WORTH_SHOWING:
        yield Tally(total, progress or (lambda _done, _total: None))
        return
    from huggingface_hub.utils import tqdm

    keep_bars_out_of_files()
    words = f"{len(files)} files" if len(files) > 1 else next(iter(files))
    with tqdm(total=total, desc=words, unit="B", unit_scale=True, name="adapterhub.download") as bar:
        yield Tally(total, lambda done, _: bar.update(done - bar.n))


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
    tally: Tally
    stop: threading.Event

    def run(self) -> str | None:
        """Fetch it and link it -> its sha256; None when it was there, or when the commit has no such file."""
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.utils import WeakFileLock

        self._check_running()
        blob = self.cache / "blobs" / self.content.name
        lock = self.cache.parent / ".locks" / self.cache.name / f"{blob.name}.lock"
        fetched = None
        with WeakFileLock(lock):  # the one that huggingface_hub takes for this blob
            if blob.is_file():
                self.tally.add(self.content.size)
            else:
                try:
                    fetched = self._fill(blob.with_suffix(".part"))
                except EntryNotFoundError:
                    blob.with_suffix(".part").unlink(missing_ok=True)
                    return None
                blob.with_suffix(".part").replace(blob)
        _link(blob, self.cache / "snapshots" / self.commit / self.name)
        return fetched

    def _fill(self, part: Path) -> str:
        """Complete ``part`` -> its sha256; what was there may be bad, so one that comes out wrong is fetched
        once more."""
        for _ in range(2):
            with part.open("a+b") as file:
                digest = self._append(file)
            if digest.is_right:
                return digest.sha256
            self.tally.add(-part.stat().st_size)
            part.unlink()
        raise HubError(
            f"{self.ref}: {self.name} arrived twice with another content than is listed "
            f"({self.content.name[:12]}…)",
            "try again; if it stays so, a proxy on the way or the Hub alters it: tell its owner",
        )

    def _append(self, file: BinaryIO) -> Digest:
        """Fetch what is missing of ``file``, over as many connections as it takes -> its digest."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        digest = Digest(self.content)
        file.seek(0)
        while chunk := file.read(_CHUNK):
            digest.add(chunk)
        self.tally.add(file.tell())
        tries = 0
        while (start := file.tell()) < self.content.size and tries < _TRIES:
            failure: Exception | None = None
            try:
                digest = self._receive(file, digest)
            except httpx2.TransportError as err:
                failure = err
            except HfHubHTTPError as err:
                if not _is_expired(err.response):
                    raise
                failure = err
            if file.tell() > start:
                tries = 0
                continue
            tries += 1
            if failure is not None and tries == _TRIES:
                raise failure
            self._pause(_PAUSE * 2 ** (tries - 1))
        digest.close()
        return digest

    def _receive(self, file: BinaryIO, digest: Digest) -> Digest:
        """One request for the rest of ``file``."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

        have = file.tell()
        headers = hub_headers(self.api) | {"Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={have}-"} if have else {}
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
                self.tally.add(-have)
                file.truncate(0)
                file.seek(0)
                digest, have = Digest(self.content), 0
            self._check_range(response, have)
            with closing(Flusher(file.fileno(), self.content.size)) as flusher:
                for chunk in response.iter_raw(_CHUNK):
                    self._check_running()
                    if file.tell() + len(chunk) > self.content.size:
                        chunk = chunk[: self.content.size - file.tell()]  # its sha256 will tell
                    file.write(chunk)
                    digest.add(chunk)
                    flusher.add(len(chunk))
                    self.tally.add(len(chunk))
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


def _is_expired(response: httpx2.Response) -> bool:
    """Whether the Hub sent us to an address that is good no more: it will give a fresh one."""
    return bool(response.history) and response.status_code in (401, 403)


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
