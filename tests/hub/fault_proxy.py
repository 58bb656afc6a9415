"""A proxy on loopback before a Hub that fails on command: what a network, a Hub or a disk can do to a client.

::

    with FaultProxy(hub_server.url) as proxy:
        push(release, repo, endpoint=proxy.url)     # passes; proxy.requests names what was asked, in order
        proxy.inject("reset", at=3)                 # the third request from now on gets a reset connection
        proxy.inject("503", at=2, forever=True)     # the second, and all after it
        proxy.inject("expired", match="signature=") # the first whose "METHOD /target" holds these words
        proxy.clear()                               # faults and counts: it passes everything again

It knows nothing of what is sent through it: models and datasets, push and pull, any client of a Hub. Each
request and each answer is held in memory while it passes, so keep them below some hundred megabytes.
``redirecting=True`` has downloads go by signed addresses, as the public Hub does; ``closing=True`` ends the
connection after each answer, so that a client looks its Hub's name up again and again. ``FAULTS`` lists all
kinds.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import quote, unquote, urlsplit

Kind = Literal[
    "reset",  # before the request reaches the Hub
    "lost answer",  # the Hub has done it, and the connection is reset in place of its answer
    "429",  # with Retry-After
    "500",
    "503",
    "truncated",  # half of the answer's body, then the end
    "drip",  # the answer in small pieces
    "too long",  # a Content-Length above what comes
    "too short",  # a Content-Length below what the Hub sends; nothing more comes
    "flipped answer",  # one bit of its body
    "flipped request",  # one bit of its body
    "expired",  # 403, as an object store says it of a signed address
    "revoked",  # the Hub does not know the token any more
]
FAULTS: Final[tuple[Kind, ...]] = Kind.__args__  # type: ignore[attr-defined]
_PASSED_ON = {"host", "content-length", "transfer-encoding", "connection"}  # are made anew
_EXPIRED = (
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
)
_PIECES = 40


@dataclass
class Fault:
    """What happens to which of the requests to come."""

    kind: Kind
    at: int
    """Which of the requests that match, from 1."""
    match: str
    """Stands in ``METHOD /target``; empty: in all."""
    forever: bool
    """All from that one on, not it alone."""
    seen: int = 0
    struck: int = 0
    """How often it happened."""

    def strikes(self, request: str) -> bool:
        self.seen += self.match in request
        hit = self.match in request and (self.seen == self.at or (self.forever and self.seen > self.at))
        self.struck += hit
        return hit


class FaultProxy:
    """Listens on a free port of loopback while its block runs; see the module's words."""

    def __init__(self, target: str, *, redirecting: bool = False, closing: bool = False) -> None:
        there = urlsplit(target)
        self.there = (str(there.hostname), there.port)
        self.redirecting = redirecting
        self.closing = closing
        self.requests: list[str] = []
        """``METHOD /target`` of each request since ``clear``."""
        self.fetched = 0
        """Bytes of bodies that the Hub sent since ``clear``."""
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def inject(self, kind: Kind, at: int = 1, *, match: str = "", forever: bool = False) -> Fault:
        """Have something go wrong, counted from now -> the fault, which tells whether it has happened."""
        fault = Fault(kind, at, match, forever)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget faults and counts."""
        with self._lock:
            self._faults, self.requests, self.fetched = [], [], 0

    def note(self, request: str) -> Kind | None:
        """Count a request -> what is to happen to it."""
        with self._lock:
            self.requests.append(request)
            struck = [fault.kind for fault in self._faults if fault.strikes(request)]
        return struck[0] if struck else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    proxy: FaultProxy

    def handle_error(self, *_: Any) -> None:
        """A client that went away is none of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for the client's delayed acknowledgement
    server: _Server

    def log_message(self, *_: Any) -> None: ...

    def handle(self) -> None:
        self.hub = http.client.HTTPConnection(*self.server.proxy.there, timeout=60)
        try:
            with suppress(OSError, http.client.HTTPException):
                super().handle()
        finally:
            self.hub.close()

    def do_any(self) -> None:
        body = self._read_body()
        proxy = self.server.proxy
        fault = proxy.note(f"{self.command} {self.path}")
        if fault == "reset":
            self._reset()
        elif fault in ("429", "500", "503"):
            self._answer(int(fault), [("Retry-After", "1")], b'{"error": "on command"}')
        elif fault == "expired":
            self._answer(403, [("Content-Type", "application/xml")], _EXPIRED)
        else:
            self._pass_on(_flip(body) if fault == "flipped request" and body else body, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_any

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _pass_on(self, body: bytes, fault: Kind | None) -> None:
        status, headers, answer = self._ask(body, revoked=fault == "revoked")
        if fault == "lost answer":
            self._reset()
        if self.server.proxy.redirecting and "/resolve/" in self.path and status in (200, 206):
            status, headers, answer = self._redirect(headers)
        self._answer(status, headers, answer, fault)

    def _ask(self, body: bytes, *, revoked: bool) -> tuple[int, list[tuple[str, str]], bytes]:
        """The Hub's own answer."""
        target = self.path
        if target.startswith("/stored/"):
            target = unquote(target.removeprefix("/stored/").partition("?")[0])
        self.hub.putrequest(self.command, target, skip_host=True, skip_accept_encoding=True)
        self.hub.putheader("Host", self.headers["Host"])  # the addresses that the Hub gives lead here
        for name, value in self.headers.items():
            if name.lower() not in _PASSED_ON:
                known = "Bearer revoked" if revoked and name.lower() == "authorization" else value
                self.hub.putheader(name, known)
        self.hub.putheader("Content-Length", str(len(body)))
        self.hub.endheaders(body)
        answer = self.hub.getresponse()
        content = answer.read()
        proxy = self.server.proxy
        with proxy._lock:
            proxy.fetched += len(content)
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _PASSED_ON]
        if self.command == "HEAD":
            headers.append(("Content-Length", answer.getheader("Content-Length", "0")))
        return answer.status, headers, content

    def _redirect(self, headers: list[tuple[str, str]]) -> tuple[int, list[tuple[str, str]], bytes]:
        """Send the client elsewhere for the bytes, with an address good for this file alone."""
        there = f"{self.server.proxy.url}/stored/{quote(self.path, safe='')}?signature=good"
        found = {name.lower(): value for name, value in headers}
        linked = [("X-Linked-Etag", found["etag"])] if "etag" in found else []
        if self.command == "HEAD":
            linked.append(("X-Linked-Size", found["content-length"]))
        kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
        return 302, [*kept, *linked, ("Location", there)], b""

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Kind | None = None
    ) -> None:
        named = {name.lower(): value for name, value in headers}
        length = int(named.get("content-length", len(body)))
        if fault in ("too long", "too short"):
            length = length + 7 if fault == "too long" else length // 2
            body = body[:length]
        if fault == "flipped answer" and body:
            body = _flip(body)
        if fault == "truncated":
            body = body[: len(body) // 2]
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        closing = self.server.proxy.closing or fault in ("truncated", "too long")
        if closing:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "drip":
            step = max(len(body) // _PIECES, 1)
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(0.001)
        else:
            self.wfile.write(body)

    def _reset(self) -> None:
        """End the connection as a crashed machine or a firewall does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for one in (self.rfile, self.wfile, self.connection):  # the last that closes it sends the reset
            one.close()
        self.close_connection = True
        raise ConnectionResetError


def _flip(data: bytes) -> bytes:
    """One bit in the middle altered."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
