"""Which files of a folder or a repository hold rows, and of which split: one rule for disks and Hubs."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Literal

Split = Literal["train", "test"]
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
# no rows in these
_ABOUT = ("adapterhub.json", "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
# A split's name stands in a file's path with anything but a letter around it, as the datasets library has it.
_SPLIT = re.compile(
    r"(?<![a-z])(train|training|test|testing|validation|valid|val|dev|eval|evaluation)(?![a-z])"
)
_NAMES: dict[str, tuple[str, ...]] = {"train": ("train", "training"), "test": ("test", "testing")}


def is_data(path: PurePosixPath) -> bool:
    """Whether a relative path is that of a file with rows: by its ending, not hidden, not about the data."""
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix in DATA_SUFFIXES and path.name not in _ABOUT and not hidden


def split_named(path: str) -> str | None:
    """The name of a split that a relative path names last (``test/part0.jsonl``: test), or None."""
    found = _SPLIT.findall(path.lower())
    return found[-1] if found else None


def belongs(path: str, split: Split) -> bool:
    """Whether a relative path names ``split``."""
    return split_named(path) in _NAMES[split]
