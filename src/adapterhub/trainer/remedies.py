"""What would have to give when a recipe does not fit: each change tried on the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adapterhub.packaging.manifest import Hardware, Quantization
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.settings import smallest
from adapterhub.trainer.shapes import ModelShape, shape_of

# Shorter rows and lower ranks than this are no remedy.
_LEAST = 8


@dataclass(frozen=True)
class Remedy:
    """One change that would make a recipe fit that does not."""

    change: str
    """Like ``data.max_length 1024`` or ``a smaller base``."""
    peak_bytes: int
    """Predicted with that change."""
    max_length: int | None = None
    """Tokens a row with that change, where it is one of them: longer examples would be left out."""


def remedies(shape: ModelShape, recipe: Recipe, hardware: Hardware, room: int, shards: int) -> list[Remedy]:
    """The changes, any one of which brings the peak to ``room`` bytes, less what can be reclaimed."""

    def needed(shape: ModelShape, changed: Recipe) -> tuple[int, int]:
        _, found = smallest(shape, changed, hardware, shards)
        return found.predicted_peak_bytes - found.reclaimable_bytes, found.predicted_peak_bytes

    found = [
        Remedy(change, peak)
        for change, changed in _keys(recipe, hardware)
        for least, peak in [needed(shape, changed)]
        if least <= room
    ]
    for change, changed in _less(recipe, lambda changed: needed(shape, changed)[0] <= room):
        length = changed.data.max_length
        shorter = length if length < recipe.data.max_length else None
        found.append(Remedy(change, needed(shape, changed)[1], shorter))
    everywhere = _with(recipe, "lora", target_modules="all-linear", rank_pattern={}, alpha_pattern={})
    for name, smaller in _REFERENCE_SHAPES:
        if smaller.parameters < shape.parameters:
            least, peak = needed(smaller, everywhere)
            if least <= room:
                found.append(Remedy(f"a smaller base: LLaMA's {name} shape fits", peak))
                break
    return found


def _keys(recipe: Recipe, hardware: Hardware) -> Iterator[tuple[str, Recipe]]:
    """Keys of the recipe that can be set to something smaller."""
    training = recipe.training
    if training.micro_batch != "auto":
        yield "training.micro_batch auto", _with(recipe, "training", micro_batch="auto")
    if training.gradient_checkpointing is False:
        yield (
            "training.gradient_checkpointing auto",
            _with(recipe, "training", gradient_checkpointing="auto"),
        )
    elif hardware.device == "cpu" and training.gradient_checkpointing == "auto":
        yield (
            "training.gradient_checkpointing true",
            _with(recipe, "training", gradient_checkpointing=True),
        )
    if training.optimizer == "adamw" and hardware.device == "cuda":
        yield (
            "training.optimizer paged_adamw_8bit",
            _with(recipe, "training", optimizer="paged_adamw_8bit"),
        )
    if recipe.lora.dora:
        yield "lora.dora false", _with(recipe, "lora", dora=False)
    if recipe.quantization is None or recipe.quantization.type == "int8":
        yield "quantization.type nf4", recipe.model_copy(update={"quantization": Quantization()})


def _less(recipe: Recipe, fits: Callable[[Recipe], bool]) -> Iterator[tuple[str, Recipe]]:
    """The longest rows that fit, the highest rank that fits, or both halved together where neither does."""
    lengths = [
        (f"data.max_length {length}", _with(recipe, "data", max_length=length))
        for length in _halves(recipe.data.max_length)
    ]
    ranks = [(f"lora.rank {rank}", _with(recipe, "lora", rank=rank)) for rank in _halves(recipe.lora.rank)]
    alone = [next(((c, r) for c, r in changes if fits(r)), None) for changes in (lengths, ranks)]
    if any(alone):
        yield from (found for found in alone if found)
        return
    for (shorter, short), (lower, low) in zip(lengths, ranks, strict=False):
        both = low.model_copy(update={"data": short.data})
        if fits(both):
            yield f"{shorter} with {lower}", both
            return


def _halves(value: int) -> list[int]:
    """``value`` halved again and again, down to ``_LEAST``."""
    return [value >> shift for shift in range(1, value.bit_length()) if value >> shift >= _LEAST]


def _with(recipe: Recipe, section: str, **values: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def _llama(hidden: int, layers: int, heads: int, intermediate: int) -> ModelShape:
    return shape_of(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
            "vocab_size": 32000,
        }
    )


# LLaMA's sizes, largest first (Touvron et al. 2023), and a small one: what a smaller base would be.
_REFERENCE_SHAPES = (
    ("65B", _llama(8192, 80, 64, 22016)),
    ("33B", _llama(6656, 60, 52, 17920)),
    ("13B", _llama(5120, 40, 40, 13824)),
    ("7B", _llama(4096, 32, 32, 11008)),
    ("1B", _llama(2048, 22, 32, 5632)),
    ("135M", _llama(576, 30, 9, 1536)),
)
