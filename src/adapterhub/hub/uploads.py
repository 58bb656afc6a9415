"""One atomic commit of local files to a Hub, by the protocol that this Hub understands."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from adapterhub.errors import HubError, ReleaseError, SignatureError
from adapterhub.hub.client import PUBLIC_HUB, RepoType, hub_errors, hub_headers
from adapterhub.hub.held import HeldFile, hold_small_files
from adapterhub.hub.tally import Progress, Tally

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_ASK_FROM: Final = 1 << 20  # bytes altogether: for less no Hub is asked whether it speaks Xet


def commit_files(
    api: HfApi,
    repo: str,
    add: Mapping[str, Path],
    delete: Iterable[str],
    *,
    message: str,
    description: str,
    parent: str,
    branch: str = "main",
    as_pull_request: bool = False,
    digests: Mapping[str, str] | None = None,
    held: Mapping[str, HeldFile] | None = None,
    repo_type: RepoType = "model",
    progress: Progress | None = None,
) -> CommitInfo:
    """Add or replace files and delete others in one commit onto ``parent``, the head of ``branch``.

    ``as_pull_request`` leaves the branch alone: the commit becomes a pull request against it.

    Files whose content the Hub has already are not sent. ``digests`` is the sha256 of files that were just
    hashed: large ones are not hashed again, and a Hub refuses one that is something else by now. ``held`` are
    small ones as they were hashed: these bytes are sent (but not through Xet). ``progress`` is told the bytes
    of the large ones that were sent, and all of them (but not through Xet, which has bars of its own).
    Raises SignatureError for another small one that has changed, ConflictError when the branch has moved from
    ``parent``, ReleaseError when the Hub refuses the card's metadata, AuthError, HubError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    digests = digests or {}
    with ExitStack() as stack:
        stack.enter_context(hub_errors(api, repo))
        small: dict[str, HeldFile] = {}
        by_stream = not _speaks_xet(api, repo, repo_type, branch, add.values())
        if by_stream:
            stack.enter_context(_without_hint_of_xet())
            small = _small_files(add, held or {}, digests)
            if progress is not None:
                stack.enter_context(_without_bars())
        large = [path for name, path in add.items() if name not in small]
        tally = Tally(sum(path.stat().st_size for path in large), progress) if progress is not None else None
        additions = [
            CommitOperationAdd(name, BytesIO(small[name].data) if name in small else str(path))
            for name, path in add.items()
        ]
        for addition in additions:
            name = addition.path_in_repo
            if name in digests and name not in small:
                addition.upload_info.sha256 = bytes.fromhex(digests[name])
            if by_stream and name not in small:  # what is opened never goes through Xet
                addition.path_or_fileobj = stack.enter_context(_open(add[name], tally))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(name) for name in delete),
            *additions,
        ]
        stack.enter_context(_card_errors(repo))
        return api.create_commit(
            repo,
            operations,
            commit_message=message,
            commit_description=description,
            parent_commit=parent,
            repo_type=repo_type,
            revision=branch,
            create_pr=as_pull_request,
        )


class _CountedFile(BufferedReader):
    """A file that tells how much of it was read, once for each byte: what is sent again counts no more."""

    def __init__(self, path: Path, tally: Tally) -> None:
        super().__init__(FileIO(path))
        self._tally, self._read_to = tally, 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        position = self.tell()
        if position > self._read_to:
            self._tally.add(position - self._read_to)
            self._read_to = position
        return data


def _open(path: Path, tally: Tally | None) -> BufferedReader:
    return path.open("rb") if tally is None else _CountedFile(path, tally)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep huggingface_hub from counting files beside what is shown of the bytes."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:  # the user has said what is wanted
        yield
        return
    with disable_progress_bars():
        yield


def _small_files(
    add: Mapping[str, Path], held: Mapping[str, HeldFile], digests: Mapping[str, str]
) -> dict[str, HeldFile]:
    """The small ones of the files: a process may not have thousands of files open."""
    files = {name: held[name] for name in add.keys() & held.keys()}
    for name in add.keys() - files.keys():
        if found := hold_small_files(add[name].parent, [add[name].name]):
            files[name] = found[add[name].name]
    for name, file in files.items():
        if digests.get(name, file.sha256) != file.sha256:
            raise SignatureError(
                f"{add[name]} changed after it was checked",
                "push again, and leave the folder alone meanwhile",
            )
    return files


def _speaks_xet(api: HfApi, repo: str, repo_type: RepoType, branch: str, files: Iterable[Path]) -> bool:
    """Whether large files go through Xet: where hf_xet is installed and the Hub offers it when it is asked.

    huggingface_hub does not negotiate: against a Hub without Xet it fails, and never tries git-lfs, which
    every Hub has. An offer to store them in a folder of this machine (``local://``) is not taken: no Hub
    chooses where files are written here.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if api.endpoint == PUBLIC_HUB:
        return True
    if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return False
    if sum(path.stat().st_size for path in files) < _ASK_FROM:
        return False
    answer = get_session().get(
        f"{api.endpoint}/api/{repo_type}s/{repo}/xet-write-token/{quote(branch, safe='')}",
        headers=hub_headers(api),
    )
    address = answer.headers.get("X-Xet-Cas-Url", "")
    return answer.status_code == 200 and address.startswith(("http://", "https://"))


@contextmanager
def _without_hint_of_xet() -> Iterator[None]:
    """Keep huggingface_hub from telling users to do what was avoided on purpose."""
    logger = logging.getLogger("huggingface_hub._commit_api")

    def is_news(record: logging.LogRecord) -> bool:
        return "not supported by Xet" not in record.getMessage()

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


@contextmanager
def _card_errors(repo: str) -> Iterator[None]:
    """Say in our words what the Hub says about the card; huggingface_hub has no class for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warnings while validating metadata")
        try:
            yield
        except ValueError as err:
            said = " ".join(str(err).split())
            if said.startswith("Invalid metadata in README.md"):
                what = said.removeprefix("Invalid metadata in README.md.").strip(" -")
                raise ReleaseError(
                    f"the Hub refuses the metadata of README.md: {what}",
                    "write it again with `adapterhub card`, or mend it",
                ) from err
            raise HubError(f"{repo}: {said}", "do it again; nothing was committed") from err
