"""One request: who asks, for which repository, with what body; and making endpoints of plain functions."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.server.accounts import Account, Accounts
from adapterhub.hub.server.addresses import Signer
from adapterhub.hub.server.documents import parse_json
from adapterhub.hub.server.limits import Limits
from adapterhub.hub.server.names import KINDS, RepoId, is_name, is_owner
from adapterhub.hub.server.refusals import Refusal, bad_request, forbidden, repo_not_found, too_large
from adapterhub.hub.server.repository import Repository
from adapterhub.hub.server.storage import Store

_TYPES = {kind: type_ for type_, kind in KINDS.items()}
_log = logging.getLogger("adapterhub.hub")


@dataclass(frozen=True, slots=True)
class Hub:
    """Everything that a request may need."""

    store: Store
    accounts: Accounts
    signer: Signer
    limits: Limits
    xet: bool = False
    """whether clients may upload through Xet: those that see this machine's files"""


@dataclass(frozen=True, slots=True)
class Call:
    """One request from one account."""

    hub: Hub
    request: Request
    account: Account | None
    """None for a caller without a token"""
    body: Any = field(default=None)
    """the JSON document, or the form's fields as lists of text"""

    def param(self, name: str) -> str:
        """A part of the address, decoded. Raises Refusal (400) when it is not UTF-8."""
        try:
            return unquote(self.request.path_params[name], errors="strict")
        except UnicodeDecodeError:
            raise bad_request(f"{name} is not valid UTF-8") from None

    def query(self, name: str) -> str | None:
        return self.request.query_params.get(name)

    def flag(self, name: str) -> bool:
        return (self.query(name) or "").lower() in ("1", "true", "yes")

    @property
    def endpoint(self) -> str:
        """This Hub's address as the client wrote it, without a trailing slash."""
        return str(self.request.base_url).rstrip("/")

    def text(self, name: str, default: str | None = None) -> str:
        """A text field of the JSON body."""
        value = self.document().get(name, default)
        if not isinstance(value, str):
            raise bad_request(f"The request lacks the text {name!r}")
        return value

    def document(self) -> dict[str, Any]:
        if not isinstance(self.body, dict):
            raise bad_request("The request's body is not a JSON object")
        return self.body

    # Repositories

    def named_repo(self) -> RepoId:
        """The repository in the address, whether or not it exists."""
        type_ = _TYPES.get(kind_of(self.request))
        owner, name = self.param("owner"), self.param("name")
        if type_ is None or not is_owner(owner) or not is_name(name):
            raise repo_not_found(f"{owner}/{name}", signed_in=self.account is not None)
        return RepoId(type_, owner, name)

    def readable(self, repo: RepoId) -> bool:
        """Whether the caller may know of the repository."""
        with contextlib.suppress(FileNotFoundError):
            private = self.hub.store.settings(repo).private
            return not private or (self.account is not None and self.account.belongs_to(repo.owner))
        return False

    def repo(self, *, write: bool = False) -> RepoId:
        """The repository in the address. Refuses one that is missing, hidden or not theirs to change."""
        repo = self.named_repo()
        if not self.readable(repo):
            raise repo_not_found(repo.full_name, signed_in=self.account is not None)
        if write:
            self.check_may_write(repo.owner)
        return repo

    def signed_in(self) -> Account:
        if self.account is None:
            raise Refusal(401, "This needs a token: send one in the Authorization header", "Unauthorized")
        return self.account

    def check_may_write(self, owner: str) -> Account:
        account = self.signed_in()
        if not account.may_write(owner):
            what = "a token with the role write" if account.belongs_to(owner) else f"a token of {owner}"
            raise forbidden(f"{account.user} may not write to {owner}/ with this token; that needs {what}")
        return account

    def contributor(self) -> Account:
        """The caller, if they may propose changes to a repository they can read."""
        account = self.signed_in()
        if account.role != "write":
            raise forbidden(
                f"{account.user} sent a token with the role {account.role}; this needs the role write"
            )
        return account

    def check_gate(self, repo: RepoId) -> None:
        """Refuse the files of a gated repository to those who were not let in."""
        settings = self.hub.store.settings(repo)
        member = self.account is not None and (
            self.account.belongs_to(repo.owner) or self.account.user in settings.granted
        )
        if settings.gated and not member:
            raise Refusal(
                403,
                f"Access to {repo.full_name} is restricted: ask {repo.owner} to grant it to you",
                "GatedRepo",
            )

    @contextlib.contextmanager
    def contents(self, repo: RepoId) -> Iterator[Repository]:
        with self.hub.store.open(repo) as repository:
            yield repository


def kind_of(request: Request) -> str:
    """``models``, ``datasets`` or ``spaces``: a part of API addresses, and what page addresses begin with."""
    first = request.scope["path"].split("/", 2)[1]
    kind: str = request.path_params.get("kind", first if first in ("datasets", "spaces") else "models")
    return kind


def author_line(account: Account) -> str:
    """How a commit of this account is signed in git."""
    return f"{account.user} <{account.user}@users.noreply.localhost>"


Handler = Callable[[Call], Any]


def endpoint(handler: Handler, body: str | None = None) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint from a plain function that runs in a worker thread.

    ``body`` is None, ``json`` (an empty one reads as an empty object) or ``form``. What the function returns
    is sent as JSON, unless it is a response already.
    """

    async def run(request: Request) -> Response:
        async def answer() -> Response:
            call = await open_call(request, body)
            result = await run_in_threadpool(handler, call)
            return result if isinstance(result, Response) else JSONResponse(result)

        return await answering(request, answer)

    return run


def streaming_endpoint(
    handler: Callable[[Call], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that reads its own body."""

    async def run(request: Request) -> Response:
        async def answer() -> Response:
            return await handler(await open_call(request, None))

        return await answering(request, answer)

    return run


async def answering(request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
    """Run it, and turn whatever goes wrong into an answer that says so."""
    hub: Hub = request.app.state.hub
    repo = _named_repo(request)
    generation = hub.store.generation(repo) if repo else 0
    try:
        return await answer()
    except Refusal as refusal:
        return refusal.response()
    except ClientDisconnect:
        return Response(status_code=400)
    except Exception as err:
        if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
            _log.error("%s %s: %s", request.method, request.url.path, err)
            return Refusal(
                507, "The Hub's disk is full; nothing of this request was kept", "DiskFull"
            ).response()
        if repo is not None and await run_in_threadpool(hub.store.went_away, repo, generation):
            return Refusal(
                404, "The repository was deleted or moved during this request", "RepoNotFound"
            ).response()
        raise


def _named_repo(request: Request) -> RepoId | None:
    """The repository in the address, as it stands there."""
    kind, names = kind_of(request), request.path_params
    if kind not in _TYPES or "owner" not in names or "name" not in names:
        return None
    return RepoId(_TYPES[kind], names["owner"], names["name"])


async def open_call(request: Request, body: str | None) -> Call:
    hub: Hub = request.app.state.hub
    account = hub.accounts.identify(_token(request))
    return Call(hub, request, account, await _read_body(request, body, hub.limits.json_body))


def _token(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


async def _read_body(request: Request, kind: str | None, limit: int) -> Any:
    if kind is None:
        return None
    raw = bytearray()
    async for chunk in limited(request, limit):
        raw += chunk
    if kind == "form":
        return parse_qs(raw.decode("utf-8", "replace"), keep_blank_values=True)
    return parse_json(raw) if raw.strip() else {}


async def limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The request's body in pieces. Raises Refusal (413) beyond ``limit`` bytes."""
    announced = request.headers.get("content-length", "")
    received = int(announced) if announced.isdigit() else 0
    if received <= limit:
        received = 0
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                break
            yield chunk
    if received > limit:
        raise too_large(f"The request's body is larger than {limit} bytes")
