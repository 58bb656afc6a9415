"""The Hub as an ASGI application: its routes, and what holds for every request."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.hub.server import (
    api_commits,
    api_contents,
    api_discussions,
    api_lfs,
    api_repos,
    api_xet,
    pages,
)
from adapterhub.hub.server.calls import Call, Hub, endpoint
from adapterhub.hub.server.refusals import Refusal, repo_not_found

_MAX_TARGET = 8 << 10  # bytes of an address with its query


def build_app(hub: Hub) -> ASGIApp:
    """The application that serves ``hub``."""
    routes = [
        *api_repos.ROUTES,
        *api_contents.ROUTES,
        *api_commits.ROUTES,
        *api_discussions.ROUTES,
        *api_lfs.ROUTES,
        *api_xet.ROUTES,
        *api_contents.FILE_ROUTES,
        # A name without an owner is nobody's repository here.
        Route("/{name}/resolve/{revision}/{path:path}", endpoint(_no_such_repo)),
        Route("/api/{kind}/{name}", endpoint(_no_such_repo)),
        *pages.ROUTES,
    ]
    app = Starlette(routes=routes, exception_handlers={404: _not_found, 405: _not_found, 500: _failed})
    app.state.hub = hub
    return _Gate(app, only_loopback_names=hub.accounts.open)


def _no_such_repo(call: Call) -> Response:
    raise repo_not_found(call.param("name"), signed_in=call.account is not None)


async def _not_found(request: Request, _: Exception) -> Response:
    return Refusal(404, f"{request.method} {request.url.path} is not a part of this Hub's API").response()


async def _failed(_: Request, __: Exception) -> Response:
    return Refusal(500, "The Hub failed; its log says why").response()


class _Gate:
    """Before any route: keeps addresses as they were sent, and keeps web pages of other sites out.

    A revision or a path may hold an encoded slash, so routes see the address undecoded, and each part is
    decoded on its own. A browser can be made to send requests to a Hub on its own machine: those carry the
    other site's Origin, or, when that site's name was pointed at this machine, its name as the Host.
    """

    def __init__(self, app: ASGIApp, *, only_loopback_names: bool) -> None:
        self._app = app
        self._only_loopback_names = only_loopback_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refusal = self._check(scope)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        await self._app({**scope, "path": scope["raw_path"].decode("latin-1")}, receive, send)

    def _check(self, scope: Scope) -> Refusal | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if len(scope["raw_path"]) + len(scope["query_string"]) > _MAX_TARGET:
            return Refusal(414, f"An address here has at most {_MAX_TARGET} bytes")
        host = headers.get(b"host", "")
        if self._only_loopback_names and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return Refusal(
                403, "A Hub without tokens answers only to localhost and loopback addresses", "Forbidden"
            )
        origin = headers.get(b"origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
            return Refusal(403, "Requests from web pages of other sites are refused", "Forbidden")
        return None


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
