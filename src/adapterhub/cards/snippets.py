"""The code that a card shows for loading its release: rendered from one template, run by the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterhub.cards.card import Card

TEMPLATES = Path(__file__).parent / "templates"
_TEMPLATE = "snippets.py.j2"
_GREETING = ({"role": "user", "content": "Hello"},)
_NEW_TOKENS = 256


@dataclass(frozen=True)
class Snippet:
    """A program that loads the release and asks it one question."""

    title: str
    code: str


def render_snippets(card: Card) -> list[Snippet]:
    """The snippets of a release's kind, ready to run beside its folder."""
    if card.manifest.kind == "adapter":
        titles = {"adapterhub": "With adapterhub", "peft": "With PEFT alone"}
    else:
        titles = {"transformers": "With transformers"}
    return [Snippet(title, _render(block, card)) for block, title in titles.items()]


def _render(block: str, card: Card) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # The output is Python, not HTML: values go in as literals through the `literal` filter.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["literal"] = _literal
    template = environment.get_template(_TEMPLATE)
    example = card.scores.example if card.scores else None
    decoding = card.scores.decoding if card.scores else {}
    context = template.new_context(
        {
            "folder": card.folder,
            # Only a commit on the Hub is certain to be this base; else the reader names a folder.
            "base": card.base.name if is_pinned(card) else f"./{card.base.name.rpartition('/')[2]}",
            "revision": card.base.revision if is_pinned(card) else None,
            "pinned": is_pinned(card),
            "quantization": card.base.quantization,
            "messages": _format_messages(example.messages if example else _GREETING),
            "max_new_tokens": decoding.get("max_new_tokens", _NEW_TOKENS),
        }
    )
    return "".join(template.blocks[block](context)).strip() + "\n"


def is_pinned(card: Card) -> bool:
    """Whether the base can be taken from the Hub by a commit, rather than from the reader's own folder."""
    return card.base_on_hub is not None and card.base.revision is not None


def _format_messages(messages: Sequence[dict[str, str]]) -> str:
    lines = [f"    {_literal(dict(message))},\n" for message in messages]
    return "[\n" + "".join(lines) + "]"


def _literal(value: object) -> str:
    """A string, number or dict of strings as Python source; JSON's form of these is Python's."""
    return json.dumps(value, ensure_ascii=False)
