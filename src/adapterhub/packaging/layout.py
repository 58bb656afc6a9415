"""How a merged checkpoint stores its tensors: in bfloat16, or as bitsandbytes keeps a quantized weight.

A 4-bit weight is packed codes, the scale of each block of 64 (quantized to 8 bits themselves by double
quantization, QLoRA section 3, with one float32 scale for 256 of them and their mean), the values that codes
stand for, and a JSON text. An LLM.int8() weight is int8 codes and the largest value of each row. The names
are those that ``save_pretrained`` of a quantized model writes, so plain ``from_pretrained`` loads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from adapterhub.packaging.manifest import Quantization
from adapterhub.packaging.tensors import DTYPE_BYTES, FLOATS, TensorEntry

if TYPE_CHECKING:
    import torch

Storage = Literal["bf16", "nf4", "fp4", "int8"]

PLAIN_DTYPE = "BF16"
BLOCK = 64
"""Weights that share a scale; transformers has no setting for another."""
_NESTED_BLOCK = 256
_CODES, _NESTED_CODES = 16, 256
# The offset's shortest exact decimal form has at most 24 characters.
_OFFSET_CHARACTERS = 24
# float32 tensors follow the JSON text: its padding puts them where a reader may map them.
_ALIGNMENT = 8


@dataclass(frozen=True)
class Stored:
    """One tensor of the new checkpoint."""

    name: str
    dtype: str
    """As safetensors writes it."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Quantized4bit:
    """A weight in 4 bits."""

    codes: torch.Tensor
    """uint8 (n / 2, 1): two codes a byte."""
    scales: torch.Tensor
    """The largest absolute value of each block, float32 (n / 64,), before double quantization."""
    values: torch.Tensor
    """What the codes stand for, float32 (16,)."""


@dataclass(frozen=True)
class Layout:
    """What each tensor of a checkpoint becomes."""

    storage: Storage
    quantized: frozenset[str]
    """The weights that are stored quantized; none for bf16."""

    def place(self, entries: Iterable[TensorEntry]) -> list[list[Stored]]:
        """For each tensor of a shard, in order: the tensors that stand for it, in order."""
        found, position = [], 0
        for entry in entries:
            parts = self._of_tensor(entry, position)
            position += sum(part.size for part in parts)
            found.append(parts)
        return found

    def _of_tensor(self, entry: TensorEntry, position: int) -> list[Stored]:
        if entry.name not in self.quantized:
            return [Stored(entry.name, PLAIN_DTYPE if entry.dtype in FLOATS else entry.dtype, entry.shape)]
        if self.storage == "int8":
            scales = entry.name.removesuffix("weight") + "SCB"
            return [Stored(scales, "F32", entry.shape[:1]), Stored(entry.name, "I8", entry.shape)]
        return _parts_of_4bit(entry, self.storage, position)


def _parts_of_4bit(entry: TensorEntry, kind: str, position: int) -> list[Stored]:
    numbers = math.prod(entry.shape)
    blocks = math.ceil(numbers / BLOCK)
    codes = Stored(entry.name, "U8", (math.ceil(numbers / 2), 1))
    scales = Stored(f"{entry.name}.absmax", "U8", (blocks,))
    length = len(json.dumps(_state(kind, entry.shape))) + _OFFSET_CHARACTERS
    length += -(position + codes.size + scales.size + length) % _ALIGNMENT
    return [
        codes,
        scales,
        Stored(f"{entry.name}.quant_state.bitsandbytes__{kind}", "U8", (length,)),
        Stored(f"{entry.name}.quant_map", "F32", (_CODES,)),
        Stored(f"{entry.name}.nested_absmax", "F32", (math.ceil(blocks / _NESTED_BLOCK),)),
        Stored(f"{entry.name}.nested_quant_map", "F32", (_NESTED_CODES,)),
    ]


def encode_4bit(weight: Quantized4bit, parts: list[Stored], shape: tuple[int, ...]) -> memoryview:
    """The bytes of all ``parts`` of a weight of ``shape``, its scales quantized here.

    As bitsandbytes' ``quantize_4bit(…, compress_statistics=True)`` does it; the JSON text is padded with
    spaces to the length that the header promised.
    """
    import torch

    scales, nested, offset, nested_values = quantize_scales(weight.scales)
    kind = parts[2].name.rpartition("__")[2]
    text = json.dumps(_state(kind, shape) | {"nested_offset": offset}).encode()
    state = torch.frombuffer(bytearray(text.ljust(parts[2].size)), dtype=torch.uint8)
    return _join([weight.codes, scales, state, weight.values, nested, nested_values])


def quantize_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """Double quantization of ``scales`` (float32): codes (uint8), their scales, the mean, the values."""
    from bitsandbytes import functional as bnb

    offset = scales.mean()
    codes, state = bnb.quantize_blockwise(scales - offset, blocksize=_NESTED_BLOCK)
    return codes, state.absmax, offset.item(), state.code


def encode_int8(codes: torch.Tensor, scales: torch.Tensor) -> memoryview:
    """The bytes of an LLM.int8() weight: scales float32 (rows,), codes int8 (rows, columns)."""
    return _join([scales, codes])


def quantization_config(storage: Storage) -> dict[str, Any]:
    """What config.json says so that transformers loads the stored weights; its own defaults are left out."""
    if storage == "int8":
        return {"quant_method": "bitsandbytes", "load_in_8bit": True}
    settings = Quantization(type=storage)  # type: ignore[arg-type]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": settings.type,
        "bnb_4bit_use_double_quant": settings.double,
        "bnb_4bit_compute_dtype": settings.compute_dtype,
    }


def _state(kind: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """What bitsandbytes' ``QuantState.as_dict`` puts into the JSON text; the offset follows."""
    return {
        "quant_type": kind,
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": list(shape),
        "nested_blocksize": _NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": "",
    }


def _join(tensors: list[torch.Tensor]) -> memoryview:
    import torch

    flat = [tensor.cpu().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat(flat).numpy().data
