"""The card as README.md: Hub metadata, and a body in which nothing from the release can become markup."""

from __future__ import annotations

from adapterhub.cards import escaping
from adapterhub.cards.card import Card
from adapterhub.cards.content import filters, gather
from adapterhub.cards.escaping import Markdown
from adapterhub.cards.metadata import front_matter
from adapterhub.cards.provenance import Fact
from adapterhub.cards.snippets import TEMPLATES


def render_readme(card: Card, *, picture: str | None) -> bytes:
    """README.md's bytes. ``picture`` is the training curve's path in the release, None when there is none."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        finalize=escaping.inline,  # every value is escaped, unless a filter made it Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters()
    environment.filters |= {"block": escaping.block, "code": escaping.code, "fact": _fact, "said": _said}
    content = gather(card) | {"front_matter": Markdown(front_matter(card)), "picture": picture}
    return environment.get_template("README.md.j2").render(content).encode()


def _said(text: str) -> Markdown:
    return escaping.block(text) if text else Markdown("(empty)")


def _fact(fact: Fact) -> str:
    return escaping.code(fact.value) if fact.is_code else fact.value
