"""Pages for browsers: what is here, a repository's card and files, a pull request. Nothing in them runs."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from adapterhub.hub.server.api_discussions import discussion_number
from adapterhub.hub.server.calls import Call, endpoint
from adapterhub.hub.server.card import body_of
from adapterhub.hub.server.discussions import Discussions
from adapterhub.hub.server.names import KINDS, PAGE_PREFIXES, RepoId
from adapterhub.hub.server.repository import Files, Repository

if TYPE_CHECKING:
    from jinja2 import Environment
    from markdown_it import MarkdownIt

_MAX_CARD_BYTES: Final = 1 << 20
_TEMPLATES = Path(__file__).parent / "templates"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222; }
header { border-bottom: 1px solid #ccc; padding-bottom: .5rem; }
a { color: #06c; } code, pre { font-size: .9em; background: #f4f4f4; }
pre { padding: .7rem; overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
article { border: 1px solid #ccc; border-radius: .4rem; padding: 0 1.2rem; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; } a { color: #6bf; } code, pre { background: #262626; }
}
"""
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS: Final = {
    # What others wrote is escaped; should that fail one day, the browser still runs and loads nothing.
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def show_index(call: Call) -> Response:
    """All repositories that the caller may see."""
    kinds = [
        (kind, [repo for repo in call.hub.store.repos(type_) if call.readable(repo)])
        for type_, kind in KINDS.items()
    ]
    found = [(kind, repos) for kind, repos in kinds if repos]
    return _page(call, "index.html.j2", title="Repositories", kinds=found)


def show_repo(call: Call) -> Response:
    """A repository at a revision: its versions, files and card."""
    repo = call.repo()
    settings = call.hub.store.settings(repo)
    revision = call.param("revision") if "revision" in call.request.path_params else "main"
    with call.contents(repo) as repository:
        commit = repository.commit_id(revision)
        files = repository.files(commit)
        first = islice(files.items(), call.hub.limits.page)
        shown = [repository.entry(path, oid) for path, (_, oid) in first]
        return _page(
            call,
            "repo.html.j2",
            title=repo.full_name,
            repo=repo,
            private=settings.private,
            gated=settings.gated,
            revision=revision,
            commit=commit,
            date=repository.commit_date(commit),
            tags=sorted(repository.refs("refs/tags/")),
            files=shown,
            more=len(files) - len(shown),
            card=_card(repo, repository, commit, files),
        )


def show_discussion(call: Call) -> Response:
    """A discussion, or a pull request with its changes."""
    repo = call.repo()
    with call.contents(repo) as repository:
        discussions = Discussions(repository)
        found = discussions.get(discussion_number(call))
        diff = discussions.diff(found) if found.base is not None else None
    return _page(call, "discussion.html.j2", title=found.title, repo=repo, discussion=found, diff=diff)


def _page(call: Call, template: str, **content: Any) -> Response:
    host = urlsplit(call.endpoint).netloc
    text = _environment().get_template(template).render(host=host, style=_STYLE, **content)
    return HTMLResponse(text, headers=_HEADERS)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["repo"] = None
    environment.filters |= {"part": lambda text: quote(text, safe=""), "path": quote}
    return environment


def _card(repo: RepoId, repository: Repository, commit: str, files: Files) -> str | None:
    """README.md as HTML without anything of its author's that a browser could obey; None without one."""
    if "README.md" not in files:
        return None
    entry = repository.entry("README.md", files["README.md"][1])
    if entry.pointer or entry.size > _MAX_CARD_BYTES:
        return None
    parser = _parser()
    tokens = parser.parse(body_of(repository.read(entry.oid)))
    inner = [token for block in tokens for token in block.children or ()]
    for token in inner:
        href = str(token.attrs.get("href", ""))
        if token.type == "link_open" and not urlsplit(href).scheme and not href.startswith(("/", "#")):
            token.attrs["href"] = f"/{repo.address}/resolve/{commit}/{href}"
    return str(parser.renderer.render(tokens, parser.options, {}))


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # HTML in the text is shown as text; links with schemes that act (javascript:) stay text too. Pictures
    # would be loaded from elsewhere, or be files that the Hub serves as plain bytes.
    parser = MarkdownIt("commonmark", {"html": False})
    return parser.enable("table").disable("image")


ROUTES = [
    Route("/", endpoint(show_index)),
    *(
        Route(f"/{prefix}{{owner}}/{{name}}{rest}", endpoint(handler))
        for prefix in sorted(PAGE_PREFIXES.values(), reverse=True)
        for rest, handler in (
            ("", show_repo),
            ("/tree/{revision}", show_repo),
            ("/commit/{revision}", show_repo),
            ("/discussions/{number}", show_discussion),
        )
    ),
]
