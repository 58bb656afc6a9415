"""An author's Markdown made safe for a place in a card, and as HTML for the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from adapterhub.cards.escaping import visible
from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

_END = "the end of what its author wrote"
_SCHEMES = ("", "http", "https", "mailto")
_LOWEST = 6


def check_markdown(text: str, where: str, level: int) -> str:
    """``text`` as CommonMark with tables whose headings begin at ``level``, and that ends where it ends.

    Raises ReleaseError, naming ``where`` and the line, for raw HTML, an image, a link to anything but a web
    or mail address or a file beside the card, and for a block that is left open.
    """
    shown = visible(text).strip("\n") + "\n"
    parser = _parser()
    tokens = parser.parse(shown)
    for token in tokens:
        for part in (token, *(token.children or ())):
            problem = _problem_of(part)
            if problem:
                line = f", line {token.map[0] + 1}" if token.map else ""
                raise ReleaseError(f"{where}{line}: {problem}", "write it as plain Markdown")
    shown = _move_headings(shown, tokens, level)
    end = [(token.type, token.level, token.content) for token in parser.parse(f"{shown}\n\n{_END}\n")[-3:-1]]
    if end != [("paragraph_open", 0, ""), ("inline", 1, _END)]:
        raise ReleaseError(
            f"{where}: a block of code is not closed", "close it with the fence that opened it"
        )
    return shown.strip("\n")


def to_html(markdown: str) -> str:
    """What ``check_markdown`` returned, as HTML; raw HTML in it would stay text."""
    parser = _parser()
    parser.options["html"] = False
    parser.add_render_rule("table_open", lambda *_: _SCROLLING.format("Table") + "<table>\n")
    parser.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")
    for kind in ("fence", "code_block"):
        parser.add_render_rule(kind, _render_code)
    html: str = parser.render(markdown)
    return html


# A group, not a region: an author may write many, and landmarks need names of their own.
_SCROLLING = '<div class="scroll" role="group" tabindex="0" aria-label="{}">'


def _render_code(_renderer: object, tokens: Sequence[Token], index: int, *_: object) -> str:
    from markupsafe import escape

    code = escape(tokens[index].content)
    return f'<pre class="program" role="group" tabindex="0" aria-label="Code"><code>{code}</code></pre>\n'


def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    # Every address becomes a link, so that _problem_of sees it.
    parser.validateLink = lambda url: True  # type: ignore[method-assign]
    return parser


def _problem_of(token: Token) -> str | None:
    if token.type in ("html_block", "html_inline"):
        return "raw HTML is not allowed in a card"
    if token.type == "image":
        return "an image is not allowed: a card loads nothing from elsewhere"
    if token.type == "link_open":
        address = str(token.attrs.get("href", ""))
        try:
            scheme = urlsplit(address).scheme.lower()
        except ValueError:
            return f"{address!r} is no address"
        if scheme not in _SCHEMES or re.match(r"[\s\\]|//", address):
            return f"a link to {address!r} is not allowed"
    return None


def _move_headings(text: str, tokens: Sequence[Token], level: int) -> str:
    """Headings at the top level begin at ``level``, and none lies more than one below the one before."""
    headings = [
        (token, tokens[at + 1])
        for at, token in enumerate(tokens)
        if token.type == "heading_open" and token.level == 0
    ]
    ranks = {tag: rank for rank, tag in enumerate(sorted({token.tag for token, _ in headings}))}
    lines = text.split("\n")
    before = level - 1
    for token, words in headings:
        assert token.map is not None
        before = min(level + ranks[token.tag], before + 1, _LOWEST)
        first, end = token.map
        lines[first] = f"{'#' * before} {' '.join(words.content.split())}"
        lines[first + 1 : end] = [""] * (end - first - 1)
    return "\n".join(lines)
