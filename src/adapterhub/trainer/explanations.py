"""Why the planner chose what it chose: one line for each choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.activations import Setting
from adapterhub.trainer.engines import why_linears, why_plain
from adapterhub.trainer.ledger import GIB, Ledger
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import ModelShape

# Fewer tokens than this at once leave the CPU busy with dequantizing: that costs as much as some 150 tokens'
# products.
CPU_TOKENS = 512
_BY_RECIPE = "as the recipe says"


@dataclass(frozen=True)
class Choice:
    """One thing the planner decided."""

    name: str
    """Like ``micro-batch``."""
    value: str
    why: str
    """One line."""


def explain(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting, found: Ledger, *, fits: bool
) -> Iterator[Choice]:
    """Each choice of ``setting``, whose ledger is ``found``; ``fits`` says whether there is room for it."""
    batch, rows = recipe.training.batch_size, setting.micro_batch
    tokens = f"{rows} × {recipe.data.max_length} tokens"
    yield Choice("micro-batch", tokens, _why_rows(recipe, hardware, fits=fits))
    yield Choice("accumulation", str(batch // rows), f"{batch} rows an optimizer step")
    yield _recomputation(shape, recipe, hardware, setting, fits=fits)
    if setting.engine == "fast":
        yield _offloading(setting, found, fits=fits)
    yield Choice("optimizer", setting.optimizer, _why_optimizer(recipe, hardware, setting, found))
    if hardware.device == "cuda":
        yield Choice("engine", setting.engine, _why_engine(shape, recipe, hardware, setting))
    if setting.kept_weights:
        yield Choice(
            "weights kept in bf16",
            f"{setting.kept_weights} of {shape.layers} layers",
            "room is left: those layers are dequantized once an optimizer step, not in each micro-batch",
        )


def _why_engine(shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting) -> str:
    if setting.engine == "linears":
        return f"4-bit products and loss in transformers' layers; whole layers: {why_linears(shape, recipe)}"
    return why_plain(shape, recipe, hardware) or "whole layers, with adapters folded into 4-bit products"


def _why_rows(recipe: Recipe, hardware: Hardware, *, fits: bool) -> str:
    if recipe.training.micro_batch != "auto":
        return _BY_RECIPE
    if not fits:
        return "the smallest there is"
    if hardware.device == "cpu":
        return f"the fewest rows that make {CPU_TOKENS} tokens; more would cost memory and gain nothing"
    return "the fastest that fits: each weight is dequantized once for all its rows"


def _recomputation(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting, *, fits: bool
) -> Choice:
    whole, mlp = setting.recompute_all, setting.recompute_mlp
    parts = [f"{whole} of {shape.layers} layers whole"] * bool(whole)
    if mlp:
        parts.append(f"the MLP of {mlp} more" if whole else f"the MLP of {mlp} of {shape.layers} layers")
    value = ", ".join(parts) or "none"
    if recipe.training.gradient_checkpointing != "auto":
        why = _BY_RECIPE
    elif hardware.device == "cpu":
        why = "off on the CPU, where time is scarcer than memory"
    elif not parts:
        why = "all activations fit"
    else:
        why = "the least that fits at this micro-batch" if fits else "all there is"
    return Choice("recomputation", value, why)


def _offloading(setting: Setting, found: Ledger, *, fits: bool) -> Choice:
    if setting.offload:
        held = _gib(found, "saved inputs")
        return Choice(
            "offloading",
            f"inputs of {setting.recompute_all} layers",
            f"{held} wait in host memory, copied while the card computes",
        )
    if not setting.recompute_all:
        return Choice("offloading", "none", "no layer is recomputed whole, so none keeps its input alone")
    return Choice("offloading", "none", "it fits without, and faster" if fits else "it would free nothing")


def _why_optimizer(recipe: Recipe, hardware: Hardware, setting: Setting, found: Ledger) -> str:
    if recipe.training.optimizer != "auto":
        return _BY_RECIPE
    if setting.optimizer != "adamw":
        return f"its 32-bit moments, {_gib(found, 'optimizer state')}, leave the card (QLoRA section 3)"
    if hardware.device == "cpu":
        return "torch's own, with 32-bit moments: there is no card that they could leave"
    if setting.shards > 1:
        return f"each card holds its part of the 32-bit moments, {_gib(found, 'optimizer state')}"
    return "32-bit moments fit beside everything else"


def _gib(found: Ledger, name: str) -> str:
    return f"{sum(part.bytes for part in found.parts if part.name == name) / GIB:.2f} GiB"
