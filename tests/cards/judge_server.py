"""A judge behind an OpenAI-compatible API that fails as it is told: what must fail on command."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[int, dict[str, Any]], "str | Fault"]
ANSWERS = re.compile(r"===== answer ([AB]) \w+ =====\n(.*?)\n===== end", re.DOTALL)


class Fault:
    """Something else than a chat completion."""

    def __init__(
        self, status: int = 200, body: str = "", headers: dict[str, str] | None = None, wait: float = 0
    ) -> None:
        self.status, self.body, self.headers, self.wait = status, body, headers or {}, wait


class JudgeServer:
    """``script(number, body)`` says what the request of that number (from 0) gets; a text is a verdict."""

    def __init__(self, script: Script, models: tuple[str, ...] = ("the-judge",)) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._script, self._models = script, models
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, json.dumps({"data": [{"id": name} for name in server._models]}), {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server._lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.keys.append(self.headers.get("authorization"))
                said = server._script(number, body)
                if isinstance(said, Fault):
                    time.sleep(said.wait)
                    self._send(said.status, said.body, said.headers)
                else:
                    choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
                    self._send(200, json.dumps({"choices": [choice]}), {})

            def _send(self, status: int, text: str, headers: dict[str, str]) -> None:
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:  # the client did not wait
                    self.close_connection = True

            def log_message(self, *_args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def answers_in(body: dict[str, Any]) -> dict[str, str]:
    """The answers A and B that a request shows to the judge."""
    (message,) = body["messages"]
    return dict(ANSWERS.findall(message["content"]))


def prefers_longer(_number: int, body: dict[str, Any]) -> str:
    """A judge that is right about length, whatever the order."""
    shown = answers_in(body)
    lengths = {name: len(text) for name, text in shown.items()}
    if lengths["A"] == lengths["B"]:
        return "Both are as long.\n\n[[TIE]]"
    return f"Longer is better.\n\n[[{max(lengths, key=lengths.__getitem__)}]]"
