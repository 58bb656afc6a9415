"""Which of the three engines trains a recipe on a machine, and what keeps a run from the faster ones."""

from __future__ import annotations

from typing import Literal

from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.activations import Engine
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import ModelShape

# Architectures that ``adapterhub.trainer.fast`` has a hand-written layer for.
FAST_TYPES = ("llama", "smollm3", "mistral", "qwen2", "qwen3", "gemma", "phi3")
# transformers' names of the activations that it has kernels for, and ours.
FAST_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Torch's flash attention takes heads of a multiple of 8 features, up to so many.
FAST_HEAD = 256


def engine_for(shape: ModelShape, recipe: Recipe, hardware: Hardware) -> Engine:
    """On CUDA ``fast``, or ``linears`` where only the adapted linears can be ours, or ``plain``."""
    if hardware.device == "cpu" or why_plain(shape, recipe, hardware) is not None:
        return "plain"
    return "fast" if why_linears(shape, recipe) is None else "linears"


def why_plain(shape: ModelShape, recipe: Recipe, hardware: Hardware) -> str | None:
    """What keeps a run from our own products on CUDA, in words; None when nothing does."""
    if hardware.count > 1:
        return "the fast path trains on one GPU"
    if recipe.quantization is None or recipe.quantization.type not in ("nf4", "fp4"):
        return "the fast path is for 4-bit bases"
    if shape.tower:
        return "the fast path is for text, and this base has a vision tower"
    if recipe.lora.dora:
        return "the fast path does not compute DoRA's row lengths"
    if recipe.lora.new_tokens:
        return "the fast path does not train rows of embeddings"
    odd = [linear for linear in shape.linears if linear.inputs % 8]
    if odd:
        return f"the fast path wants inputs in eights, and {odd[0].path} has {odd[0].inputs}"
    return None


def why_linears(shape: ModelShape, recipe: Recipe) -> str | None:
    """What keeps a run from whole layers of ours, in words; None when nothing does."""
    if shape.model_type not in FAST_TYPES:
        return f"of the architecture {shape.model_type} there is none"
    if shape.activation not in FAST_ACTIVATIONS:
        return f"there is no kernel for the activation {shape.activation}"
    if shape.dropout:
        return f"they have no dropout in the base, and its {shape.dropout} is not zero"
    if shape.head_dim % 8 or shape.head_dim > FAST_HEAD:
        return f"there is no attention for heads of {shape.head_dim} features"
    if recipe.quantization is not None and recipe.quantization.compute_dtype == "float32":
        return "there is no attention in float32"
    return None
