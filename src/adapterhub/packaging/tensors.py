"""The safetensors container: its header read with suspicion, its tensors found by offset.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header
``{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}``, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 32 * 1024 * 1024
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""The dtypes that weights come in, with torch's names."""

MAX_SIDES = 16
"""Sides of a shape: no tensor in use has half as many, and thousands take for ever to multiply."""

_LENGTH_BYTES = 8
_DAMAGED = "it is damaged or was made to mislead: take it from its source again"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a safetensors file."""

    name: str
    dtype: str
    """As the format writes it: ``BF16``, ``F32``, …"""
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was found sound."""

    path: Path
    entries: tuple[TensorEntry, ...]
    """In the order in which they lie in the file."""
    metadata: dict[str, str]
    data_start: int
    """Bytes before the first tensor: the length field and the header."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.data_start + sum(entry.size for entry in self.entries)


def read_header(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises ReleaseError when the header is over 32 MiB or malformed, when a dtype is unknown, when a
    tensor's bytes are not what its shape needs, or when tensors overlap, leave gaps, or do not end where
    the file ends.
    """
    if not path.is_file():
        raise ReleaseError(f"{path}: no such file", "check the path")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise ReleaseError(
                f"{path} is too short to be a safetensors file of its header's length", _DAMAGED
            )
        if length > MAX_HEADER_BYTES:
            raise ReleaseError(
                f"{path} has a header of {length} bytes; {MAX_HEADER_BYTES} are allowed", _DAMAGED
            )
        header = file.read(length)
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(content, dict):
            raise ValueError("the header is not a JSON object")
        metadata = _check_metadata(content.pop("__metadata__", {}))
        start = _LENGTH_BYTES + length
        entries = sorted(
            (_parse_entry(name, entry, start) for name, entry in content.items()),
            key=lambda entry: (entry.offset, entry.size),
        )
        _check_contiguous(entries, start, size)
    except (ValueError, RecursionError) as err:
        raise ReleaseError(f"{path} is not a sound safetensors file: {err}", _DAMAGED) from err
    return TensorFile(path, tuple(entries), metadata, start)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds ``tensors`` (name, dtype, shape) in order, padded to 8 bytes."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def read_tensor(file: TensorFile, entry: TensorEntry) -> torch.Tensor:
    """One tensor of a file as a torch tensor in its own dtype, read without mapping the file.

    Raises ReleaseError when its dtype is not one of ``FLOATS`` or when the file ends early.
    """
    import torch

    if entry.dtype not in FLOATS:
        raise ReleaseError(
            f"{file.path}: {entry.name!r} is {entry.dtype}, not a float tensor",
            f"expected {', '.join(FLOATS)}",
        )
    buffer = read_bytes(file, entry.offset, entry.size)
    dtype = getattr(torch, FLOATS[entry.dtype])
    if not buffer:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(entry.shape)


def read_bytes(file: TensorFile, offset: int, size: int) -> bytearray:
    """``size`` bytes of a file from ``offset`` on. Raises ReleaseError when the file ends early."""
    buffer = bytearray(size)
    with file.path.open("rb", buffering=0) as source:
        read_exactly(source.fileno(), memoryview(buffer), offset, file.path)
    return buffer


def read_exactly(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill ``view`` from ``offset`` of an open file. Raises ReleaseError when the file ends early."""
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise ReleaseError(f"{path} ended while it was read", "it changed meanwhile: do it again")
        view, offset = view[count:], offset + count


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _check_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a map from text to text")
    return metadata


def _parse_entry(name: str, entry: object, start: int) -> TensorEntry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has a malformed shape or malformed offsets")
    if len(shape) > MAX_SIDES:
        raise ValueError(f"{name!r} has a shape of {len(shape)} sides; {MAX_SIDES} are allowed")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name!r} has {end - begin} bytes, which is not what {dtype}{shape} needs")
    return TensorEntry(name, dtype, tuple(shape), start + begin, end - begin)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_contiguous(entries: list[TensorEntry], start: int, size: int) -> None:
    position = start
    for entry in entries:
        if entry.offset != position:
            raise ValueError(f"{entry.name!r} overlaps another tensor or leaves a gap")
        position += entry.size
    if position != size:
        raise ValueError(f"the tensors end at byte {position} and the file at {size}")
