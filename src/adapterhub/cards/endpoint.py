"""A judge model behind an OpenAI-compatible HTTP API, which may be slow, busy, broken or talk nonsense."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from adapterhub.cards.escaping import one_line
from adapterhub.cards.judging import Failure, Reply, prompt_sha256
from adapterhub.cards.judgments import Rater
from adapterhub.errors import AdapterHubError

if TYPE_CHECKING:
    import httpx2

_CHAT: Final = "/chat/completions"
_AGAIN: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_REFUSED: Final = frozenset({401, 403, 404, 405})
_FIRST_PAUSE: Final = 0.5  # seconds; twice as long before each further try
_LONGEST_PAUSE: Final = 120.0
_WORDS: Final = 200  # characters of a server's message that are shown


class Endpoint:
    """A model of an OpenAI-compatible endpoint, asked with temperature 0.

    ``url`` is the API's address, like ``http://localhost:8000/v1``. ``model`` may be left out where the
    endpoint serves one alone. ``timeout`` is in seconds, for each part of a request; ``tries`` are made for a
    prompt, ``at_once`` prompts are on their way together. Raises AdapterHubError for an address or a model
    that cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        key: str | None,
        *,
        max_tokens: int,
        timeout: float,
        tries: int,
        at_once: int,
    ) -> None:
        self._url = url.rstrip("/").removesuffix(_CHAT)
        self._tries, self._at_once = tries, at_once
        self._client = _connect(self._url, key, timeout)
        self._gate = _Gate()
        self._has_answered = False
        self._max_tokens = max_tokens
        self._body: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        try:
            self.model = model or self._only_model()
        except BaseException:
            self.close()
            raise

    @property
    def rater(self) -> Rater:
        """How the arena calls it. The key is no part of it."""
        settings = {
            "endpoint": self._url,
            "temperature": 0,
            "max_tokens": self._max_tokens,
            "prompt_sha256": prompt_sha256(),
        }
        return Rater(name=self.model, kind="model", settings=settings)

    def close(self) -> None:
        """Drop the connections; requests on their way fail."""
        self._client.close()

    def reply(self, prompts: Sequence[str]) -> Iterator[Reply | Failure]:
        """The reply to each prompt, in order. Raises AdapterHubError when the endpoint refuses to serve."""
        pool = ThreadPool(self._at_once)  # its threads keep no interrupted program waiting for an answer
        pending: deque[AsyncResult[Reply | Failure]] = deque()
        try:
            for prompt in prompts:
                pending.append(pool.apply_async(self._ask, (prompt,)))
                if len(pending) > self._at_once:
                    yield pending.popleft().get()
            while pending:
                yield pending.popleft().get()
        finally:  # an interrupt, a refusal, or a reader who has seen enough: nothing more is asked
            self._gate.shut()
            pool.terminate()

    def _ask(self, prompt: str) -> Reply | Failure:
        """Ask until there is a reply, the tries are used up, or the endpoint says that none will come."""
        last: Reply | Failure = Failure("not asked", is_outage=True)
        for number in range(self._tries):
            if not self._gate.wait():
                break
            outcome = self._try(prompt)
            if not isinstance(outcome, _TryAgain):
                self._has_answered = True
                return outcome
            last, pause = outcome.otherwise, outcome.after
            if pause is None:
                pause = min(_FIRST_PAUSE * 2**number * random.uniform(0.5, 1), _LONGEST_PAUSE)
            if pause > _LONGEST_PAUSE:
                break
            if number + 1 < self._tries:
                self._gate.hold(pause)
        if isinstance(last, Reply) and not self._has_answered:
            return Failure("the answer is no chat completion", is_outage=True)
        return last

    def _try(self, prompt: str) -> Reply | Failure | _TryAgain:
        import httpx2

        body, messages = self._body, [{"role": "user", "content": prompt}]
        try:
            response = self._client.post(
                self._url + _CHAT, json={"model": self.model, "messages": messages, **body}
            )
        except httpx2.TimeoutException:
            return _TryAgain(Failure("no answer in time", is_outage=True))
        except httpx2.HTTPError as err:
            return _TryAgain(Failure(f"no connection: {_short(str(err))}", is_outage=True))
        if response.status_code == 200:
            return _read_reply(response)
        said = _message_of(response)
        if response.status_code in _REFUSED:
            self._gate.shut()
            raise AdapterHubError(
                f"the judge at {self._url} refuses to answer (HTTP {response.status_code}): {said}",
                "check --judge, --model and the key",
            )
        if response.status_code in _AGAIN:
            words = "rate limit" if response.status_code == 429 else f"HTTP {response.status_code}"
            return _TryAgain(Failure(words, is_outage=True), _retry_after(response))
        if response.status_code == 400 and self._adapt(response, body):
            return self._try(prompt)
        return Failure(f"HTTP {response.status_code}: {said}", is_outage=False)

    def _adapt(self, response: httpx2.Response, sent: dict[str, Any]) -> bool:
        """Leave out or rename a setting that the model does not take, as OpenAI's reasoning models do not."""
        refused = _error_of(response).get("param")
        if refused not in ("temperature", "max_tokens") or refused not in sent:
            return False
        rest = {name: value for name, value in sent.items() if name != refused}
        self._body = rest if refused == "temperature" else rest | {"max_completion_tokens": self._max_tokens}
        return True

    def _only_model(self) -> str:
        import httpx2

        try:
            response = self._client.get(f"{self._url}/models")
            names = [entry["id"] for entry in response.raise_for_status().json()["data"]]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as err:
            raise AdapterHubError(
                f"{self._url} does not say which models it serves: {_short(str(err)) or type(err).__name__}",
                "check the address (it often ends in /v1) and the key, or name one with --model",
            ) from err
        if len(names) != 1:
            raise AdapterHubError(
                f"{self._url} serves {len(names)} models: {_short(', '.join(map(str, names)))}",
                "name one with --model",
            )
        return str(names[0])


class _TryAgain:
    """What may pass."""

    def __init__(self, otherwise: Reply | Failure, after: float | None = None) -> None:
        self.otherwise = otherwise
        """What it comes to when it does not."""
        self.after = after
        """Seconds that the endpoint asks for."""


class _Gate:
    """Holds back all requests while the endpoint wants no more of them."""

    def __init__(self) -> None:
        self._open_at = 0.0
        self._shut = threading.Event()
        self._lock = threading.Lock()

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._open_at = max(self._open_at, time.monotonic() + seconds)

    def shut(self) -> None:
        self._shut.set()

    def wait(self) -> bool:
        """Wait until a request may go out; False when none may any more."""
        while (rest := self._open_at - time.monotonic()) > 0:
            if self._shut.wait(rest):
                return False
        return not self._shut.is_set()


def _connect(url: str, key: str | None, timeout: float) -> httpx2.Client:
    import httpx2

    try:
        parsed = httpx2.URL(url)
        urlsplit(url)  # httpx2 lets half an IPv6 address pass
    except (httpx2.InvalidURL, ValueError) as err:
        raise AdapterHubError(
            f"{url!r} is no address: {err}", "write it like http://localhost:8000/v1"
        ) from err
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise AdapterHubError(
            f"{url!r} is no address of an API", "write it like http://localhost:8000/v1; the key goes apart"
        )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Redirects are not followed: the key is for this address.
    return httpx2.Client(headers=headers, timeout=timeout, follow_redirects=False)


def _read_reply(response: httpx2.Response) -> Reply | _TryAgain:
    """A chat completion's text. What is none is a reply without a verdict, whatever its words are."""
    try:
        choice = response.json()["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return _TryAgain(Reply(response.text, finished=False))
    if not isinstance(text, str):  # a refusal has null there
        return Reply("")
    return Reply(text, finished=choice.get("finish_reason") != "length")


def _retry_after(response: httpx2.Response) -> float | None:
    """The seconds in a Retry-After header, or until its date; None without one."""
    value = response.headers.get("retry-after", "").strip()
    if value.replace(".", "", 1).isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _error_of(response: httpx2.Response) -> dict[str, Any]:
    try:
        error = response.json()["error"]
    except (ValueError, LookupError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _message_of(response: httpx2.Response) -> str:
    return _short(str(_error_of(response).get("message") or response.text or response.reason_phrase))


def _short(text: str) -> str:
    return one_line(text)[:_WORDS]
