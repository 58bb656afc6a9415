"""The card as card.html: one file that needs no network, for any screen, light or dark, and for paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterhub.cards.authored import to_html
from adapterhub.cards.card import Card
from adapterhub.cards.content import filters
from adapterhub.cards.escaping import visible
from adapterhub.cards.snippets import TEMPLATES

if TYPE_CHECKING:
    from jinja2 import Environment


def render_page(card: Card, content: Mapping[str, Any], pictures: Mapping[str, str]) -> bytes:
    """card.html's bytes, from what ``content.gather`` gives. ``pictures`` are SVG elements."""
    from markupsafe import Markup

    parts = card.ledger.parts if card.ledger else ()
    values = dict(content) | {
        "pictures": {name: Markup(svg) for name, svg in pictures.items()},
        "style": page_style("page.css"),
        "largest_part": max((part.bytes for part in parts), default=0),
    }
    return page_environment().get_template("card.html.j2").render(values).encode()


def page_environment() -> Environment:
    """jinja2 for pages: every value is escaped, and what hides in it is shown."""
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
    environment.filters |= {"words": lambda text: Markup(to_html(text))}
    return environment


def page_style(name: str) -> Any:
    """A style sheet of ours, as markup."""
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _show(value: Any) -> Any:
    """Text with its control and direction characters made visible; markup and figures as they are."""
    return visible(value) if type(value) is str else value
