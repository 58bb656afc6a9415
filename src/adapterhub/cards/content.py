"""What both renderings of a card print: the same facts and sentences, for README.md and for the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapterhub.cards import formats, prose, provenance
from adapterhub.cards.card import Card
from adapterhub.cards.failures import CLASSES, expected_text
from adapterhub.cards.snippets import is_pinned, render_snippets


def gather(card: Card) -> dict[str, Any]:
    """The templates' variables, as plain text; the renderer escapes them."""
    return {
        "card": card,
        "summary": prose.summarize(card),
        "headline": prose.headline(card),
        "failures_in_words": prose.describe_failures(card),
        "run_in_words": prose.describe_run(card),
        "limits": prose.limits(card),
        "snippets": render_snippets(card),
        "base_is_pinned": is_pinned(card),
        "facts": provenance.list_facts(card),
        "recipe": _to_yaml(card.manifest.recipe),
        "commands": {
            "measure": provenance.command_to_measure(card),
            "replay": provenance.command_to_replay(card),
            "verify": provenance.commands_to_verify(card),
        },
    }


def filters() -> dict[str, Callable[..., str]]:
    """The templates' filters that turn figures into words."""
    return {
        "bytes": formats.in_bytes,
        "class_in_words": lambda name: CLASSES.get(name, ""),
        "expected": expected_text,
        "figures": formats.in_figures,
        "hardware": formats.hardware_in_words,
        "interval_of": formats.interval_of,
        "metric": formats.METRICS.__getitem__,
        "rows_of": formats.rows_of,
        "time": formats.in_time,
        "value_of": formats.value_of,
    }


def _to_yaml(recipe: dict[str, Any] | None) -> str | None:
    import yaml

    return None if recipe is None else yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
