"""Pages in a real browser: headless Chromium, spoken to over a pipe by its DevTools protocol."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SECONDS = 120
"""How long a command may take on a busy machine."""
_READ_BYTES = 1 << 20


class Browser:
    """One tab. Pages stay as they are, under their own policy: what a test evaluates is no part of them."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        # Chromium reads commands from its descriptor 3 and answers on 4, each message ended by a zero byte.
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        commands, answers = _above_the_two(commands), _above_the_two(answers)
        script = f'exec "$@" 3<&{commands} 4>&{answers}'
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
            f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", script, "chromium", CHROMIUM, *options],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._received = b""
        self._number = 0
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session: str | None = attached["sessionId"]
        self.call("Page.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def show(self, url: str, *, width: int = 1000, dark: bool = False) -> None:
        """Load a page, and wait until it is loaded; ``width`` in CSS pixels."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.call("Page.navigate", {"url": "about:blank"})  # another fragment of the same page loads nothing
        self.call("Page.navigate", {"url": url})
        self.run(
            "document.readyState === 'complete' || new Promise((go) => addEventListener('load', () => go()))"
        )

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, JSON's kinds of values; a promise's when it is kept."""
        expression = {"expression": script, "returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", expression)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def type(self, text: str) -> None:
        """Type into what has the focus, as a person would."""
        self.call("Input.insertText", {"text": text})

    def press_enter(self) -> None:
        """Press the key on what has the focus."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", {"type": kind, **key})

    def call(self, method: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer of the tab to one command of the protocol."""
        return self._call(method, arguments or {}, self._session)

    def _call(self, method: str, arguments: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _SECONDS
        while True:
            answer = self._read(until)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._answers], [], [], max(0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            read = os.read(self._answers, _READ_BYTES)
            assert read, "the browser ended"
            self._received += read
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


def _above_the_two(descriptor: int) -> int:
    """The same descriptor under a number that none of the two is put upon."""
    higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return higher
