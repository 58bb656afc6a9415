"""What 4-bit quantization does to weights: which of a checkpoint's it touches, and what comes out of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from adapterhub.errors import ReleaseError
from adapterhub.packaging.manifest import Quantization
from adapterhub.packaging.tensors import TensorEntry

if TYPE_CHECKING:
    import torch

# Dense decoders in whose layers every matrix is a torch.nn.Linear, and so is quantized. Mixtures of experts
# keep some matrices out (routers, fused experts), and GPT-2 transposes; a wrong guess would merge onto
# other weights than trained.
DENSE_MODEL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2",
    "granite",
)  # fmt: skip
# On import bitsandbytes advises an inference kernel that quantizing does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_IN_A_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\..+\.weight")
# Quantized at a time: fits the processor's cache, and a whole number of blocks of any size bitsandbytes has.
_CHUNK = 1 << 18


def quantized_names(config: Mapping[str, Any], tensors: Iterable[TensorEntry]) -> set[str]:
    """The names of the weights that transformers quantizes with bitsandbytes: all linear layers but the head.

    ``config`` is the base's config.json. Raises ReleaseError for a model type whose layers are not known
    here.
    """
    model_type = config.get("model_type")
    if model_type not in DENSE_MODEL_TYPES:
        raise ReleaseError(
            f"which weights of a {model_type!r} model are quantized is not known here",
            f"merge --onto original --to bf16; else this knows {', '.join(DENSE_MODEL_TYPES)}",
        )
    return {entry.name for entry in tensors if len(entry.shape) == 2 and _IN_A_LAYER.fullmatch(entry.name)}


def through_4bit_(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """Quantize and dequantize ``weight`` (bfloat16, contiguous) in place: as training on its device saw it.

    In bfloat16 whatever the compute dtype, because the base is loaded so and dequantized weights are cast
    after that. Bit for bit bitsandbytes' ``dequantize_4bit(*quantize_4bit(weight.flatten(), …))``, computed
    in pieces that fit the cache. Returns ``weight``. Raises ReleaseError for LLM.int8(), which sets
    outliers apart by activation and so has no such weights.
    """
    if quantization.type == "int8":
        raise ReleaseError("a base in LLM.int8() has no dequantized weights", "merge --onto original")
    import torch
    from bitsandbytes import functional as bnb

    size, kind = quantization.block_size, quantization.type
    pieces = weight.view(-1).split(_CHUNK)
    quantized = [
        bnb.quantize_4bit(piece, blocksize=size, compress_statistics=False, quant_type=kind)
        for piece in pieces
    ]
    scales = torch.cat([state.absmax for _codes, state in quantized])
    if quantization.double:
        offset = scales.mean()
        codes, state = bnb.quantize_blockwise(scales - offset, blocksize=256)
        scales = bnb.dequantize_blockwise(codes, state) + offset
    blocks = _CHUNK // size
    for number, (piece, (codes, state)) in enumerate(zip(pieces, quantized, strict=True)):
        state.absmax = scales[number * blocks : number * blocks + state.absmax.numel()]
        piece.copy_(bnb.dequantize_4bit(codes, state).reshape(-1))
    return weight


def words_of(quantization: Quantization | None) -> str:
    """A number format in words."""
    if quantization is None:
        return "bf16"
    double = ", scales quantized" if quantization.double else ""
    return f"{quantization.type}, blocks of {quantization.block_size}{double}"
