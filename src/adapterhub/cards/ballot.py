"""People's verdicts: what they are shown, and the local page on which they judge, blind."""

from __future__ import annotations

import socket
from base64 import b64encode
from collections.abc import Callable, Sequence
from hashlib import sha256
from secrets import compare_digest, token_urlsafe
from typing import TYPE_CHECKING, Any

from adapterhub.cards.contest import Contest, Showing, Task
from adapterhub.cards.judgments import Rater, Verdict
from adapterhub.cards.page import page_environment, page_style
from adapterhub.cards.snippets import TEMPLATES

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

VERDICTS: dict[str, Verdict] = {"first": "first", "second": "second", "tie": "tie"}
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_MAX_FORM_BYTES = 4096


class Ballot:
    """One person's way through a contest: each pair once, in an order that tells nothing.

    Which answer comes first, and which question is next, is drawn from a digest of rater and question: it
    looks random, and it is the same after a break.
    """

    def __init__(self, contest: Contest, a: str, b: str, rater: str) -> None:
        contest.admit(Rater(name=rater, kind="person"))
        self._contest, self._a, self._b, self._rater = contest, *sorted((a, b)), rater
        self.open = sorted(
            contest.unjudged(self._a, self._b, rater, self._orders), key=lambda it: self._draw(it.task)
        )
        """What is still to be judged, next first."""

    @property
    def total(self) -> int:
        """How many pairs there are."""
        return len(self._contest.tasks)

    @property
    def judged(self) -> int:
        """How many of them have a verdict."""
        return self.total - len(self.open)

    def give(self, verdict: Verdict) -> None:
        """Keep the verdict on the pair that is shown, and go on."""
        self._contest.add_judgment(self.open[0].judged(verdict, self._rater))
        del self.open[0]

    def skip(self) -> None:
        """Put the pair that is shown at the end."""
        self.open.append(self.open.pop(0))

    def _orders(self, task: Task) -> Sequence[tuple[str, str]]:
        first, second = (self._a, self._b) if self._draw(task)[0] & 1 else (self._b, self._a)
        return ((first, second),)

    def _draw(self, task: Task) -> bytes:
        seed = "\0".join((self._rater, task.id, self._a, self._b))
        return sha256(seed.encode()).digest()


def build_ballot_app(ballot: Ballot, finish: Callable[[], None]) -> Starlette:
    """The page as a Starlette application. ``finish`` is called once the last verdict was given and told.

    The systems' names reach no page. A form is taken only with this run's token, and only from this machine's
    own names: other sites' pages in the same browser can neither read nor vote.
    """
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse
    from starlette.routing import Route

    token = token_urlsafe(24)

    def show(_request: Request) -> Response:
        page, policy = _render(ballot, token)
        done = None if ballot.open else BackgroundTask(finish)
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store", "X-Frame-Options": "DENY"}
        return HTMLResponse(page, headers=headers, background=done)

    async def vote(request: Request) -> Response:
        if int(request.headers.get("content-length", _MAX_FORM_BYTES + 1)) > _MAX_FORM_BYTES:
            return PlainTextResponse("too long", 413)
        form = await _read_form(request)
        if not compare_digest(form.get("token", "").encode(), token.encode()):
            return PlainTextResponse("this form is of an earlier run: load the page again", 403)
        # A form that was sent twice, or from another tab, is of a pair that is no longer shown.
        if ballot.open and form.get("showing") == _name(ballot.open[0]):
            choice = form.get("verdict", "")
            if choice in VERDICTS:
                ballot.give(VERDICTS[choice])
            elif choice == "skip":
                ballot.skip()
        return RedirectResponse("/", 303)

    return Starlette(
        routes=[Route("/", show), Route("/verdict", vote, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(_LOCAL), www_redirect=False)],
    )


def serve_ballot(ballot: Ballot, port: int, announce: Callable[[str], None]) -> None:
    """Serve the page on loopback until everything is judged, or Ctrl-C. ``port`` 0 takes a free one.

    ``announce`` gets its address once it can be reached. Raises OSError when the port is taken.
    """
    import uvicorn

    listener = socket.create_server(("127.0.0.1", port))

    def finish() -> None:
        server.should_exit = True

    app = build_ballot_app(ballot, finish)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False))
    with listener:
        announce(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        server.run(sockets=[listener])


async def _read_form(request: Request) -> dict[str, str]:
    """A form of plain fields; multipart would need a further package."""
    from urllib.parse import parse_qsl

    text = (await request.body()).decode("utf-8", "replace")
    return dict(parse_qsl(text, keep_blank_values=True))


def _name(showing: Showing) -> str:
    """What a form calls a pair; it says nothing of its systems."""
    return sha256(showing.task.id.encode()).hexdigest()[:16]


def _render(ballot: Ballot, token: str) -> tuple[str, str]:
    """The page, and the content security policy that lets its own script run and nothing else."""
    script = (TEMPLATES / "ballot.js").read_text(encoding="utf-8")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    values: dict[str, Any] = {
        "showing": ballot.open[0] if ballot.open else None,
        "name": _name(ballot.open[0]) if ballot.open else None,
        "number": ballot.judged + 1,
        "judged": ballot.judged,
        "total": ballot.total,
        "token": token,
        "style": page_style("page.css") + page_style("ballot.css"),
        "script": page_style("ballot.js"),
    }
    return page_environment().get_template("ballot.html.j2").render(values), policy
