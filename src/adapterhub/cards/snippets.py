"""The code that a card shows for loading its release: rendered from one template, run by the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterhub.cards.card import Card
from adapterhub.packaging.serving import vllm_rank

TEMPLATES = Path(__file__).parent / "templates"
_TEMPLATE = "snippets.py.j2"
_GREETING = ({"role": "user", "content": "Hello"},)
_NEW_TOKENS = 256


@dataclass(frozen=True)
class Snippet:
    """A program that loads the release and asks it one question."""

    title: str
    code: str
    note: str | None = None
    """What a reader must know of it."""


def render_snippets(card: Card) -> list[Snippet]:
    """The snippets of a release's kind, ready to run beside its folder."""
    if card.manifest.kind == "adapter":
        titles = {"adapterhub": "With adapterhub", "peft": "With PEFT alone"}
    else:
        titles = {"transformers": "With transformers"}
    found = [Snippet(title, _render(block, card)) for block, title in titles.items()]
    if _is_for_vllm(card):
        found.append(Snippet("With vLLM", _render("vllm", card), _vllm_note(card)))
    return found


def describe_base(card: Card) -> str | None:
    """What a reader must do for the base that the programs name; None where a Hub has it by its commit."""
    if is_pinned(card) or card.manifest.kind != "adapter":
        return None
    return (
        f"The base was read from a folder, and no commit on a Hub is known to hold it: {base_source(card)} "
        "stands for the folder where you have it. load_adapter and the commands check its base digest and "
        "refuse another base; PEFT and vLLM do not check."
    )


def base_source(card: Card) -> str:
    """How programs and commands name the base: on the Hub with its commit beside it, or as a folder."""
    # Only a commit on the Hub is certain to be this base; else the reader names a folder.
    return card.base.name if is_pinned(card) else f"./{card.base.name.rpartition('/')[2]}"


def _is_for_vllm(card: Card) -> bool:
    """Whether vLLM can be told to load it: 4 bits of bitsandbytes or none, and nothing that it refuses."""
    if card.manifest.kind == "adapter":
        quantization = card.base.quantization
        return card.vllm_obstacles == () and (quantization is None or quantization.type == "nf4")
    return card.manifest.merge is None or card.manifest.merge.dtype in ("bfloat16", "nf4")


def _vllm_note(card: Card) -> str:
    note = "Needs a GPU, and was not run when this card was made."
    if card.manifest.kind == "adapter" and card.base.quantization is not None:
        note += " vLLM quantizes the base in its own way, so answers may differ from those measured."
    return note


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
            "base": base_source(card),
            "name": card.manifest.name,
            "adapter_rank": _vllm_rank(card),
            "revision": card.base.revision if is_pinned(card) else None,
            "pinned": is_pinned(card),
            "token_rows": card.adapter.token_rows if card.adapter else 0,
            "quantization": card.base.quantization,
            "messages": _format_messages(example.messages if example else _GREETING),
            "max_new_tokens": decoding.get("max_new_tokens", _NEW_TOKENS),
        }
    )
    return "".join(template.blocks[block](context)).strip() + "\n"


def _vllm_rank(card: Card) -> int | None:
    """The least maximum that vLLM takes for the adapter's rank; None for what is no adapter."""
    if card.manifest.kind != "adapter" or card.adapter is None:
        return None
    return vllm_rank(card.adapter.r)


def is_pinned(card: Card) -> bool:
    """Whether the base can be taken from the Hub by a commit, rather than from the reader's own folder."""
    return card.base_on_hub is not None and card.base.revision is not None


def _format_messages(messages: Sequence[dict[str, str]]) -> str:
    lines = [f"    {_literal(dict(message))},\n" for message in messages]
    return "[\n" + "".join(lines) + "]"


def _literal(value: object) -> str:
    """A string, number or dict of strings as Python source; JSON's form of these is Python's."""
    return json.dumps(value, ensure_ascii=False)
