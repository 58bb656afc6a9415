"""The card as card.html: one file that needs no network, for any screen, light or dark, and for paper."""

from __future__ import annotations

from typing import Any

from adapterhub.cards.card import Card
from adapterhub.cards.content import filters, gather
from adapterhub.cards.escaping import visible
from adapterhub.cards.snippets import TEMPLATES


def render_page(card: Card, *, picture: str | None) -> bytes:
    """card.html's bytes. ``picture`` is the training curve as an SVG element, None when there is none."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=_show,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters()
    content = gather(card) | {
        "picture": None if picture is None else Markup(picture),
        "style": Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        "largest_part": max((part.bytes for part in card.ledger.parts), default=0) if card.ledger else 0,
    }
    return environment.get_template("card.html.j2").render(content).encode()


def _show(value: Any) -> Any:
    """Text with its control and direction characters made visible; markup and figures as they are."""
    return visible(value) if type(value) is str else value
