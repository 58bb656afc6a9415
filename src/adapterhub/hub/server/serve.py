"""Running the Hub until it is told to stop."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from adapterhub.errors import HubError
from adapterhub.hub.server import xet
from adapterhub.hub.server.accounts import Accounts, new_record
from adapterhub.hub.server.addresses import Signer
from adapterhub.hub.server.app import build_app, is_loopback
from adapterhub.hub.server.calls import Hub
from adapterhub.hub.server.limits import Limits
from adapterhub.hub.server.names import NAME_RULE, is_owner
from adapterhub.hub.server.storage import Store

_GRACE = 3  # seconds that running requests get after the signal to stop


def serve(
    root: Path,
    host: str,
    port: int,
    user: str | None,
    token: str | None,
    *,
    announce: Callable[[str, bool], None],
) -> None:
    """Serve the Hub in ``root`` until SIGINT or SIGTERM.

    ``port`` 0 takes a free one. With ``user`` and ``token`` that user may write to their own namespace; with
    neither, and no tokens kept in ``root``, everybody on this machine may write everywhere. ``announce`` gets
    the address, and whether everybody may write, once connections are accepted. Raises HubError for a root in
    use, a user name the Hub does not allow, or an open Hub on a public address; OSError when the port is
    taken.
    """
    if user is not None and not is_owner(user):
        raise HubError(f"{user!r} is not a user name", NAME_RULE)
    given = new_record(token, user, "write", ()) if user is not None and token is not None else None
    accounts = Accounts(root, given)
    if accounts.open and not is_loopback(host):
        raise HubError(
            f"a Hub without tokens would let everybody who reaches {host} write to it",
            "give --user and --token, add tokens with `adapterhub hub token add`, or keep to loopback",
        )
    store = Store(root)
    try:
        limits = Limits()
        signer = Signer(root, limits.address_lifetime)
        hub = Hub(store, accounts, signer, limits, xet=is_loopback(host) and xet.is_available())
        with _bind(host, port) as listener:
            shown = f"[{host}]" if ":" in host else host
            _run(
                hub, listener, lambda: announce(f"http://{shown}:{listener.getsockname()[1]}", accounts.open)
            )
    finally:
        store.close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only where a socket says it is TCP; else each answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except socket.gaierror as err:
        listener.close()
        raise HubError(f"{host} is no address of this machine: {err.strerror}", "check --host") from err
    except OSError as err:
        listener.close()
        raise OSError(err.errno, err.strerror, f"{host}:{port}") from err
    return listener


def _run(hub: Hub, listener: socket.socket, ready: Callable[[], None]) -> None:
    config = uvicorn.Config(
        build_app(hub),
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
    )
    # uvicorn stops gracefully, then raises the signal again for these handlers: nothing is left to do.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda *_: None)
    _Server(config, ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says when it accepts connections."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
