"""A transformers checkpoint folder: its configuration, its shards, and where each tensor lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import ReleaseError
from adapterhub.packaging.base import weight_files
from adapterhub.packaging.files import check_relative_path
from adapterhub.packaging.tensors import TensorEntry, TensorFile, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
_MAX_JSON_BYTES = 64 * 1024 * 1024
_FIX = "name the folder of a complete transformers checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were found sound; no tensor was read yet."""

    folder: Path
    config: dict[str, Any]
    """config.json."""
    shards: tuple[TensorFile, ...]
    """One file, or those that the index names, sorted by name."""
    sharded: bool
    """Whether an index names the files."""
    tensors: dict[str, TensorEntry]
    """Every tensor by name."""

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def open_checkpoint(folder: Path, *, quantized: bool = False) -> Checkpoint:
    """Read a checkpoint's configuration, index and headers.

    Raises ReleaseError when a part is missing or malformed, when the index and the shards disagree, and
    when the weights are quantized already: those are not what an adapter can be added to.
    """
    if not folder.is_dir():
        raise ReleaseError(f"{folder}: no such folder", "check the path of the base model")
    config = _read_json(folder / CONFIG_NAME)
    if config.get("quantization_config") and not quantized:
        raise ReleaseError(
            f"the base in {folder} is quantized already", "name the 16-bit base it was made from"
        )
    sharded = (folder / INDEX_NAME).is_file() and not (folder / SINGLE_NAME).is_file()
    names = read_index(folder) if sharded else {SINGLE_NAME: None}
    if not sharded and not (folder / SINGLE_NAME).is_file():
        weight_files(folder)  # says so when there are only pickles
        raise ReleaseError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}", _FIX)
    tensors: dict[str, TensorEntry] = {}
    shards = []
    for name, expected in sorted(names.items()):
        shard = read_header(folder / name)
        found = {entry.name: entry for entry in shard.entries}
        if expected is not None and expected != found.keys():
            odd = sorted(expected ^ found.keys())
            raise ReleaseError(
                f"{shard.path} does not hold what {INDEX_NAME} says: {', '.join(odd[:3])}", _FIX
            )
        shards.append(shard)
        tensors.update(found)
    return Checkpoint(folder, config, tuple(shards), sharded, tensors)


def read_index(folder: Path) -> dict[str, set[str] | None]:
    """The names of the tensors that the index puts in each file.

    Raises ReleaseError for an index that is malformed, or that names what is no file name in this folder.
    """
    path = folder / INDEX_NAME
    mapping = _read_json(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ReleaseError(f"{path} has no weight_map", _FIX)
    files: dict[str, set[str] | None] = {}
    for tensor, file in mapping.items():
        try:
            if not isinstance(file, str) or "/" in check_relative_path(file):
                raise ValueError(f"{file!r} is not a file name")
        except ValueError as err:
            raise ReleaseError(f"{path}: {err}", _FIX) from err
        names = files.setdefault(file, set())
        assert names is not None
        names.add(tensor)
    return files


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ReleaseError(f"{path.parent} holds no {path.name}", _FIX)
    with path.open("rb") as file:
        data = file.read(_MAX_JSON_BYTES + 1)
    try:
        if len(data) > _MAX_JSON_BYTES:
            raise ValueError("too large")
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as err:
        raise ReleaseError(f"{path} is not valid JSON: {err}", _FIX) from err
    return content
