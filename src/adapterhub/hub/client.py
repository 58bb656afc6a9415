"""Speaking to a Hub: one place that makes the client, and one that turns what goes wrong into our errors."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, cast
from urllib.parse import quote, urlsplit

from adapterhub.errors import (
    AdapterHubError,
    AdapterHubWarning,
    AuthError,
    ConflictError,
    HubError,
    RefError,
)
from adapterhub.hub.records import write_note
from adapterhub.hub.refs import Ref
from adapterhub.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi, ModelInfo

RepoType = Literal["model", "dataset"]
PUBLIC_HUB: Final = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FIRST_ANSWER: Final = 20.0  # seconds; huggingface_hub itself would wait for ever, here and below
_CONNECT: Final = 20.0
_SILENCE: Final = 180.0  # without a byte either way: a Hub may think about a large commit for a while
_NETWORK = "check the network, and that --endpoint or HF_ENDPOINT names a Hub that is running"
_TOKEN = "set HF_TOKEN, or log in with `hf auth login`"


def connect(endpoint: str | None = None, token: str | None = None) -> HfApi:
    """A client of one Hub.

    ``endpoint`` is its address, else $HF_ENDPOINT, else the public Hub; every call made through the client
    goes there. ``token`` is the access token, else $HF_TOKEN or what `hf auth login` stored. Where stderr is
    no terminal, huggingface_hub shows no progress bars once it is used through the client. Raises HubError
    for an endpoint that is no http address.
    """
    # huggingface_hub reads HF_ENDPOINT once, when it is imported; a caller may have set it since.
    address = (endpoint or os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise HubError(f"{address!r} is not the address of a Hub", "write it like https://huggingface.co")
    return cast("HfApi", _LateApi(address, token or None))


class _LateApi:
    """An HfApi that is imported when it is first called: that takes longer than a pull of what is here."""

    library_name: Final = "adapterhub"
    library_version: Final = __version__

    def __init__(self, endpoint: str, token: str | None) -> None:
        self.endpoint = endpoint
        self.token = token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    @cached_property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        keep_bars_out_of_files()
        return HfApi(
            endpoint=self.endpoint,
            token=self.token,
            library_name=self.library_name,
            library_version=self.library_version,
        )


def hub_headers(api: HfApi) -> dict[str, str]:
    """The headers that calls through ``api`` carry: the token, and who is calling."""
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(
        token=api.token, library_name=api.library_name, library_version=api.library_version
    )


def _ask(api: HfApi, path: str, timeout: float) -> dict[str, Any]:
    """What the Hub answers about a repository, as HfApi would ask it; see ``_LateApi`` for why it is not."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    answer = get_session().get(f"{api.endpoint}/api/{path}", headers=hub_headers(api), timeout=timeout)
    hf_raise_for_status(answer)
    content = answer.json()
    if not isinstance(content, dict):
        raise HubError(f"{api.endpoint} answered nonsense about {path}", _NETWORK)
    return content


def keep_bars_out_of_files() -> None:
    """Have huggingface_hub show no progress bars where stderr is no terminal, unless the user said so."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    in_notebook = "ipykernel" in sys.modules  # shows bars of its own, though its stderr is no terminal
    chosen = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None  # the user has said what is wanted
    if not (sys.stderr.isatty() or in_notebook or chosen):
        disable_progress_bars()


def has_token(api: HfApi) -> bool:
    """Whether calls through ``api`` carry a token."""
    from huggingface_hub import get_token

    return bool(api.token or get_token())


class Resolved(NamedTuple):
    """What a reference names."""

    commit: str
    """40 hex digits."""
    offline: bool
    """Whether the cache answered, for the Hub could not be asked."""


def resolve(api: HfApi, ref: Ref, repo_type: RepoType = "model") -> Resolved:
    """The commit that ``ref`` names now; no revision means the main branch.

    When the Hub cannot be reached, a version is what the cache last saw under that name, and so is anything
    else if the user has set HF_HUB_OFFLINE; an AdapterHubWarning says so. Raises HubError for another name
    then, which may have moved on; RefError, AuthError.
    """
    if ref.revision is not None and ref.is_commit:
        return Resolved(ref.revision, offline=False)
    try:
        with hub_errors(api, ref):
            at = "" if ref.revision is None else f"/revision/{quote(ref.revision, safe='')}"
            commit = _ask(api, f"{repo_type}s/{ref.repo}{at}", _FIRST_ANSWER).get("sha")
    except Unreachable as err:
        return Resolved(_recall(api, ref, repo_type, err), offline=True)
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise HubError(f"{api.endpoint} names no commit for {ref}", "check that it is a Hub")
    _remember(ref, repo_type, commit)
    return Resolved(commit, offline=False)


def look_up(api: HfApi, ref: Ref, repo_type: RepoType = "model") -> ModelInfo | DatasetInfo | None:
    """What a Hub tells of a repository; None when it has none of that name that the token may see."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with hub_errors(api, ref):
        try:
            if repo_type == "dataset":
                return api.dataset_info(ref.repo, timeout=_FIRST_ANSWER)
            return api.model_info(ref.repo, timeout=_FIRST_ANSWER)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None


def list_tags(api: HfApi, ref: Ref, repo_type: RepoType = "model") -> dict[str, str]:
    """The tags of a repository on the Hub: name to commit. Raises RefError, AuthError, HubError."""
    with hub_errors(api, ref.repo):
        content = _ask(api, f"{repo_type}s/{ref.repo}/refs", _SILENCE)
    try:
        return {str(tag["name"]): str(tag["targetCommit"]) for tag in content["tags"]}
    except (LookupError, TypeError) as err:
        raise HubError(f"{api.endpoint} answered nonsense about {ref.repo}", _NETWORK) from err


def repo_cache(repo: str, repo_type: RepoType = "model") -> Path:
    """The folder of the Hugging Face cache that holds a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"{repo_type}s--{repo.replace('/', '--')}"


def _recall(api: HfApi, ref: Ref, repo_type: RepoType, err: Unreachable) -> str:
    """The commit that the cache knows under a name, said to be from there; ``err`` where it may not do."""
    from huggingface_hub import is_offline_mode

    known = _remembered(api, ref, repo_type)
    if known is None:
        raise err
    if ref.version is None and not is_offline_mode():
        raise HubError(
            f"{err.what}; {ref} may have moved since it was fetched",
            f"{err.fix}; to take what was fetched then, name the commit ({ref.repo}@{known}) "
            "or set HF_HUB_OFFLINE=1",
        ) from err
    why = "offline" if is_offline_mode() else f"the Hub could not be reached ({err.what})"
    words = f"{why}; this is what was pulled before as {ref}"
    warnings.warn(AdapterHubWarning(f"{words}: {known[:12]}"), stacklevel=3)
    return known


def _remembered(api: HfApi, ref: Ref, repo_type: RepoType) -> str | None:
    from huggingface_hub.errors import RevisionResolutionError

    try:
        return api.resolve_revision(
            ref.repo, repo_type=repo_type, revision=ref.revision, local_files_only=True
        ).resolved
    except RevisionResolutionError:
        return None


def _remember(ref: Ref, repo_type: RepoType, commit: str) -> None:
    """Note in the cache, where huggingface_hub would, which commit a name stood for; a cache may be read-
    only."""
    cache = repo_cache(ref.repo, repo_type)
    path = cache / "refs" / (ref.revision or "main")
    try:
        if path.is_file() and path.read_text() == commit:
            return
        write_note(path, commit.encode(), cache)
    except OSError as err:
        if err.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


@contextmanager
def offline() -> Iterator[None]:
    """Inside the block the cache alone answers, as HF_HUB_OFFLINE has it for a whole process."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


class Unreachable(HubError):
    """No answer from the Hub: what is in the cache may still do."""


@contextmanager
def hub_errors(api: HfApi, subject: Ref | str) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block, about ``subject``, into an error of our tree.

    Calls that huggingface_hub makes without a limit of time get one: a Hub that freezes is an error too. The
    operating system's own errors (a full disk, no permission) pass through as they are.
    """
    _limit_silence()
    try:
        yield
    except AdapterHubError:
        raise
    except Exception as err:
        explained = _explain(err, api, str(subject))
        if explained is None:
            raise
        raise explained from err


def _limit_silence() -> None:
    """Give huggingface_hub's shared HTTP client time limits, unless who made it has given it some."""
    import httpx2
    from huggingface_hub.utils import get_session

    session = get_session()
    if session.timeout == httpx2.Timeout(None):
        session.timeout = httpx2.Timeout(_SILENCE, connect=_CONNECT)


def _explain(err: BaseException, api: HfApi, subject: str) -> Exception | None:
    """The error of ours that stands for ``err``; None when it is not the Hub's."""
    import httpx2  # huggingface_hub's own HTTP client
    from huggingface_hub import errors

    if isinstance(err, errors.HfHubHTTPError):
        return _explain_answer(err, api, subject)
    if isinstance(err, errors.HFValidationError):
        return RefError(f"{subject}: {_line(err)}", "write it as owner/name[@revision]")
    if isinstance(err, errors.OfflineModeIsEnabled):
        return Unreachable(
            f"offline (--offline or HF_HUB_OFFLINE): {api.endpoint} is not asked about {subject}",
            "leave out --offline, or unset HF_HUB_OFFLINE; what was fetched once is in the cache by "
            "its commit or its version",
        )
    if isinstance(err, httpx2.HTTPError | httpx2.InvalidURL):
        return Unreachable(f"no answer from {api.endpoint} about {subject}: {_line(err)}", _NETWORK)
    if isinstance(err, RuntimeError) and "client has been closed" in str(err):
        # huggingface_hub closes the connections of all threads when one of them cannot connect
        return Unreachable(f"no answer from {api.endpoint} about {subject}: connections broke off", _NETWORK)
    if isinstance(err, json.JSONDecodeError):
        return HubError(f"{api.endpoint} does not answer like a Hub", _NETWORK)
    if isinstance(err, OSError) and err.errno is not None:
        return None
    if "No space left on device" in str(err):  # hf_xet tells of a full disk in words only
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(repo_cache(subject.partition("@")[0])))
    if isinstance(err, ValueError | LookupError | TypeError | AttributeError) and _is_from_client(err):
        return HubError(f"{api.endpoint} answered nonsense about {subject}: {_line(err)}", _NETWORK)
    # huggingface_hub wraps what happened in words of its own: a missing cache entry, a failed upload.
    cause = err.__cause__
    explained = _explain(cause, api, subject) if cause is not None else None
    if explained is None and isinstance(err, OSError | errors.RevisionResolutionError):
        return HubError(f"{subject} could not be had from {api.endpoint}: {_line(err)}", _NETWORK)
    return explained


def _is_from_client(err: BaseException) -> bool:
    """Whether it was raised inside huggingface_hub, which reads answers as if they were always right."""
    trace = err.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(name).startswith("huggingface_hub.")


def _explain_answer(err: Exception, api: HfApi, subject: str) -> HubError:
    """What a Hub's refusal means."""
    from huggingface_hub import errors

    assert isinstance(err, errors.HfHubHTTPError)
    status = err.response.status_code
    said = err.server_message or err.response.headers.get("X-Error-Message") or _line(err)
    said = " ".join(said.split())
    if isinstance(err, errors.GatedRepoError):
        page = f"{api.endpoint}/{_page_of(err.response.url.path, subject)}"
        with_token = "send the token of who was granted it" if has_token(api) else _TOKEN
        return AuthError(
            f"{subject} is gated: {said}",
            f"ask for access at {page}, which its owner grants, then {with_token}",
        )
    if isinstance(err, errors.RepositoryNotFoundError):
        if has_token(api):
            return RefError(
                f"{api.endpoint} has no repository {subject} that your token may see",
                "check the name, and whether that token may read it if it is private",
            )
        return RefError(
            f"{api.endpoint} has no public repository {subject}",
            f"check the name; for a private one, or to write, {_TOKEN}",
        )
    if isinstance(err, errors.RevisionNotFoundError):
        return RefError(
            f"{subject}: {api.endpoint} has no such revision", "check the version, branch or commit"
        )
    if isinstance(err, errors.EntryNotFoundError):
        return RefError(f"{subject}: {said}", "check that it is the right repository and revision")
    if status == 401:
        if has_token(api):
            return AuthError(f"{api.endpoint} does not know the token sent for {subject}", _TOKEN)
        return AuthError(f"{subject} needs a token, and none was sent to {api.endpoint}", _TOKEN)
    if status == 403:
        return AuthError(f"the token may not do this with {subject}: {said}", "use a token that may")
    if status in (409, 412):
        return ConflictError(f"{subject}: {said}", "look at what is there now, and do it again")
    if status == 429:
        return HubError(
            f"{api.endpoint} has had too many requests: {said}", "wait some minutes, then do it again"
        )
    if status >= 500:
        return HubError(f"{api.endpoint} failed ({status}) with {subject}: {said}", "try again later")
    return HubError(f"{api.endpoint} refused ({status}) {subject}: {said}", _NETWORK)


def _page_of(path: str, subject: str) -> str:
    """Where a browser finds a repository, given the path of a call about it."""
    folder = "datasets/" if path.startswith(("/api/datasets/", "/datasets/")) else ""
    return folder + subject.partition("@")[0]


def _line(err: BaseException, limit: int = 240) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
