"""The card as README.md: Hub metadata, and a body in which nothing from the release can become markup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub.cards import escaping
from adapterhub.cards.card import Card
from adapterhub.cards.content import filters
from adapterhub.cards.escaping import Markdown
from adapterhub.cards.metadata import front_matter
from adapterhub.cards.provenance import Fact
from adapterhub.cards.snippets import TEMPLATES
from adapterhub.cards.tables import Cell, Table


def render_readme(card: Card, content: Mapping[str, Any], pictures: Mapping[str, str]) -> bytes:
    """README.md's bytes, from what ``content.gather`` gives. ``pictures`` are their paths in the release."""
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
    environment.filters |= {
        "block": escaping.block,
        "code": escaping.code,
        "fact": _fact,
        "said": _said,
        "table": _table,
        "words": Markdown,  # an author's, checked by words.render_words
    }
    values = dict(content) | {"front_matter": Markdown(front_matter(card)), "pictures": dict(pictures)}
    return environment.get_template("README.md.j2").render(values).encode()


def _said(text: str) -> Markdown:
    return escaping.block(text) if text else Markdown("(empty)")


def _fact(fact: Fact) -> str:
    return escaping.code(fact.value) if fact.is_code else fact.value


def _table(table: Table) -> Markdown:
    heads: list[str] = [escaping.inline(column.name) for column in table.columns]
    rules = ["---:" if column.is_number else "---" for column in table.columns]
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in [heads, rules, *rows]))


def _cell(cell: Cell) -> str:
    if cell.style == "code":
        return escaping.code(cell.text)
    text = escaping.inline(cell.text)
    return f"**{text}**" if cell.style == "strong" and text else text
