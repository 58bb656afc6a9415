"""The README's front matter: what the Hub reads of a card."""

from __future__ import annotations

from typing import Any

from adapterhub.cards.card import Card, is_hub_name
from adapterhub.cards.escaping import one_line
from adapterhub.cards.licences import HUB_LICENCES
from adapterhub.cards.results import model_index
from adapterhub.packaging.manifest import Kind

RELATIONS: dict[Kind, str] = {"adapter": "adapter", "merged": "merge", "quantized": "quantized"}
_LIBRARIES: dict[Kind, str] = {"adapter": "peft", "merged": "transformers", "quantized": "transformers"}


def front_matter(card: Card) -> str:
    """The card's metadata as YAML without the ``---`` lines, as huggingface_hub's parsers read it."""
    from huggingface_hub import ModelCardData

    manifest = card.manifest
    datasets = [data.source for data in card.rows("train") if is_hub_name(data.source)]
    known: dict[str, Any] = {**_licence(card), **model_index(card)}
    data = ModelCardData(
        library_name=_LIBRARIES[manifest.kind],
        pipeline_tag="text-generation",
        base_model=card.base_on_hub,
        base_model_relation=RELATIONS[manifest.kind] if card.base_on_hub else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=_tags(card),
        **known,
    )
    return data.to_yaml()


def _licence(card: Card) -> dict[str, str]:
    """``license`` as the Hub knows it; any other goes by name and the release's own text of it, beside
    ``license: other``."""
    licence = card.licensing.licence
    if licence is None:
        return {}
    name = one_line(licence)
    if name.lower() in HUB_LICENCES:
        return {"license": name.lower()}
    texts = [path for path in card.manifest.files if path.upper().startswith(("LICENSE", "LICENCE"))]
    return {"license": "other", "license_name": name} | ({"license_link": min(texts)} if texts else {})


def _tags(card: Card) -> list[str]:
    quantization = card.base.quantization
    tags = ["adapterhub", "lora"]
    if quantization is not None and quantization.type in ("nf4", "fp4"):
        tags.append("qlora")
    if card.manifest.kind != "adapter":
        tags.append(card.manifest.kind)
    return tags
