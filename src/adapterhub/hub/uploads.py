"""One atomic commit of local files to a Hub, by the protocol that this Hub understands."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final
from urllib.parse import quote

from adapterhub.errors import HubError, ReleaseError
from adapterhub.hub.client import PUBLIC_HUB, RepoType, hub_errors

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_READ_UP_TO: Final = 1 << 20  # bytes
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
    repo_type: RepoType = "model",
) -> CommitInfo:
    """Add or replace files and delete others in one commit onto ``parent``, the head of ``branch``.

    ``as_pull_request`` leaves the branch alone: the commit becomes a pull request against it.

    Files whose content the Hub has already are not sent. ``digests`` is the sha256 of files that were just
    hashed: they are not hashed again, and a Hub refuses a large one that is something else by now. Raises
    ConflictError when the branch has moved from ``parent``, ReleaseError when the Hub refuses the card's
    metadata, AuthError, HubError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with ExitStack() as stack:
        stack.enter_context(hub_errors(api, repo))
        additions = [CommitOperationAdd(name, path) for name, path in add.items()]
        for addition in additions:
            if digest := (digests or {}).get(addition.path_in_repo):
                addition.upload_info.sha256 = bytes.fromhex(digest)
        if not _speaks_xet(api, repo, repo_type, branch, add.values()):
            stack.enter_context(_without_hint_of_xet())
            for addition in additions:
                addition.path_or_fileobj = stack.enter_context(_as_stream(add[addition.path_in_repo]))
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


def _as_stream(path: Path) -> BinaryIO:
    """A file as huggingface_hub never sends it through Xet, even with hf_xet installed: opened.

    Small ones are read, for a process may not have thousands of files open.
    """
    return path.open("rb") if path.stat().st_size > _READ_UP_TO else BytesIO(path.read_bytes())


def _speaks_xet(api: HfApi, repo: str, repo_type: RepoType, branch: str, files: Iterable[Path]) -> bool:
    """Whether large files go through Xet: where hf_xet is installed and the Hub offers it when it is asked.

    huggingface_hub does not negotiate: against a Hub without Xet it fails, and never tries git-lfs, which
    every Hub has. An offer to store them in a folder of this machine (``local://``) is not taken: no Hub
    chooses where files are written here.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    if api.endpoint == PUBLIC_HUB:
        return True
    if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return False
    if sum(path.stat().st_size for path in files) < _ASK_FROM:
        return False
    answer = get_session().get(
        f"{api.endpoint}/api/{repo_type}s/{repo}/xet-write-token/{quote(branch, safe='')}",
        headers=build_hf_headers(
            token=api.token, library_name=api.library_name, library_version=api.library_version
        ),
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
