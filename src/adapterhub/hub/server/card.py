"""A model card's metadata: read from README.md's front matter, checked, and turned into tags."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from datetime import date
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MAX_CHARACTERS = 256 << 10
_MAX_DEPTH = 20
_TEXT = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_relation")
_TEXT_OR_LIST = ("tags", "datasets", "base_model", "language", "metrics")


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases: a few lines of those grow into gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a card's metadata")
        return super().compose_node(parent, index)


def read_card(readme: bytes) -> dict[str, Any]:
    """The front matter as plain JSON data; empty when there is none or it cannot be read."""
    try:
        return _load(_front_matter(readme.decode("utf-8", "replace")) or "")
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}


def body_of(readme: bytes) -> str:
    """The card without its front matter."""
    text = readme.decode("utf-8", "replace")
    found = _FRONT_MATTER.match(text[:_MAX_CHARACTERS])
    return text[found.end() :] if found else text


def check_card(readme: str) -> tuple[list[str], list[str]]:
    """What is wrong with a card's metadata -> (errors, warnings)."""
    front_matter = _front_matter(readme)
    if front_matter is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = _load(front_matter)
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        return [f"the YAML metadata cannot be read: {' '.join(str(err).split())}"], []
    errors = [f'"{key}" must be a string' for key in _TEXT if not isinstance(card.get(key, ""), str)]
    errors += [
        f'"{key}" must be a string or a list of strings'
        for key in _TEXT_OR_LIST
        if card.get(key) and not _texts(card[key], strict=True)
    ]
    return errors, []


def describe_card(card: Mapping[str, Any], files: Container[str], repo_type: str) -> dict[str, Any]:
    """``cardData`` and what the Hub derives from it: ``tags``, ``library_name``, ``pipeline_tag``."""
    described: dict[str, Any] = {"cardData": dict(card)} if card else {}
    tags = []
    for key in ("library_name", "pipeline_tag") if repo_type == "model" else ():
        if isinstance(card.get(key), str):
            described[key] = card[key]
            tags.append(card[key])
    if repo_type == "model" and any(
        name in files for name in ("model.safetensors", "adapter_model.safetensors")
    ):
        tags.append("safetensors")
    tags += [*_texts(card.get("tags")), *_texts(card.get("language"))]
    tags += [f"dataset:{name}" for name in _texts(card.get("datasets"))]
    for key in ("task_categories", "size_categories") if repo_type == "dataset" else ():
        tags += [f"{key}:{name}" for name in _texts(card.get(key))]
    relation = card.get("base_model_relation")
    for base in _texts(card.get("base_model")):
        tags.append(f"base_model:{base}")
        if isinstance(relation, str):
            tags.append(f"base_model:{relation}:{base}")
    tags += [f"license:{name}" for name in _texts(card.get("license"))]
    return {**described, "tags": list(dict.fromkeys(tags))}


def _front_matter(readme: str) -> str | None:
    found = _FRONT_MATTER.match(readme[:_MAX_CHARACTERS])
    return found[1] if found else None


def _load(front_matter: str) -> dict[str, Any]:
    card = yaml.load(front_matter, Loader=_Loader)
    if card is None:
        return {}
    if not isinstance(card, dict):
        raise ValueError("the metadata is not a mapping of keys to values")
    return {str(key): _plain(value) for key, value in card.items()}


def _plain(value: Any, depth: int = 0) -> Any:
    """YAML's dates, numbers that JSON lacks, and odd keys, as text."""
    if depth > _MAX_DEPTH:
        raise ValueError("the metadata is nested too deeply")
    if isinstance(value, dict):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, date | bytes | float) and not (
        isinstance(value, float) and abs(value) < float("inf")
    ):
        return str(value)
    return value


def _texts(value: object, *, strict: bool = False) -> list[str]:
    """The strings in a string or a list; with ``strict``, none at all when something else is among them."""
    values = value if isinstance(value, list) else [value]
    texts = [item for item in values if isinstance(item, str)]
    return [] if strict and len(texts) != len(values) else texts
