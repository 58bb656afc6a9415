"""A TCP proxy on loopback that counts what goes through it, and can cut everything off."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_REQUEST_END = b" HTTP/1.1\r\n"  # stands once in a request: at the end of its first line
_CHUNK = 1 << 18


@dataclass
class Traffic:
    """What went through since the last ``reset``; bytes of bodies and headers alike."""

    requests: int = 0
    sent: int = 0
    """From the client to the Hub."""
    fetched: int = 0
    """From the Hub to the client."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def reset(self) -> None:
        with self.lock:
            self.requests = self.sent = self.fetched = 0


@contextlib.contextmanager
def counting_proxy(target: str) -> Iterator[tuple[str, Traffic]]:
    """Forward a free port of loopback to ``target`` (an http address) -> its address, and the counts."""
    there = urlsplit(target)
    traffic = Traffic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(
            target=_accept, args=(listener, (there.hostname, there.port), traffic), daemon=True
        ).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", traffic
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, target: tuple[str | None, int | None], traffic: Traffic) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:  # closed: the block has ended
            return
        hub = socket.create_connection(target)  # type: ignore[arg-type]
        for one in (client, hub):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_forward_requests, args=(client, hub, traffic), daemon=True).start()
        threading.Thread(target=_forward_answers, args=(hub, client, traffic), daemon=True).start()


def _forward_requests(client: socket.socket, hub: socket.socket, traffic: Traffic) -> None:
    tail = b""
    with _both_closed(client, hub):
        while data := client.recv(_CHUNK):
            seen = tail + data
            with traffic.lock:
                traffic.requests += seen.count(_REQUEST_END)
                traffic.sent += len(data)
            tail = seen[-len(_REQUEST_END) + 1 :]
            hub.sendall(data)


def _forward_answers(hub: socket.socket, client: socket.socket, traffic: Traffic) -> None:
    with _both_closed(hub, client):
        while data := hub.recv(_CHUNK):
            client.sendall(data)
            with traffic.lock:
                traffic.fetched += len(data)


@contextlib.contextmanager
def _both_closed(source: socket.socket, target: socket.socket) -> Iterator[None]:
    """When one side ends, so does the other; a side that is gone already is no error here."""
    try:
        with contextlib.suppress(OSError):
            yield
    finally:
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
