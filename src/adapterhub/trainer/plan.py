"""The planner: how to train a recipe on a machine so that it fits and is as fast as the ledger allows.

Cost model, for the order of settings only and never printed as a speed: a micro-batch takes the
floating-point operations of its products (two a weight and token forward, two backward, two more for what is
computed again) at the device's measured matrix rate, plus one pass over the dequantized weights for each of
these; an optimizer step takes the passage of paged state over the bus; offloading slows everything a little.
Of the settings that fit, the cheapest a token is taken; of equals, the one with the smaller peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from adapterhub.errors import RecipeError, TrainingError
from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.activations import Setting
from adapterhub.trainer.engines import engine_for
from adapterhub.trainer.explanations import CPU_TOKENS, Choice, explain
from adapterhub.trainer.ledger import GIB, Ledger, ledger
from adapterhub.trainer.placement import adapter_weights
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.remedies import Remedy, remedies
from adapterhub.trainer.settings import (
    host_holds,
    may_offload,
    micro_batches,
    optimizers,
    recomputations,
    smallest,
)
from adapterhub.trainer.shapes import ModelShape

# bf16 matrix products (FLOP/s) and device memory (B/s), by a part of the device's name; the first was
# measured here.
_RATES = {"H200": (790e12, 4.3e12), "H100": (700e12, 2.9e12), "A100": (250e12, 1.7e12)}
_OTHER_RATE = (150e12, 0.8e12)
# Bytes moved to dequantize one NF4 weight: half a byte read, two written, two read by the product.
_DEQUANTIZE_BYTES = 4.5
# Those of a weight that is kept dequantized.
_READ_BYTES = 2.0
# Bytes a second between host and card, each way (PCIe 4, 16 lanes), and what sharing it costs the products.
_BUS = 25e9
_OFFLOAD_SLOWDOWN = 1.02
# transformers' names for the optimizers, as TrainingArguments(optim=…) wants them.
_TRANSFORMERS_OPTIMIZER = {
    "adamw": "adamw_torch",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


@dataclass(frozen=True)
class Plan:
    """How a recipe is trained on a machine, and whether it fits."""

    shape: ModelShape
    hardware: Hardware
    setting: Setting
    ledger: Ledger
    batch_size: int
    """Rows an optimizer step."""
    reserve_bytes: int
    """Left free for what no ledger knows: other programs, fragmentation."""
    choices: tuple[Choice, ...]
    remedies: tuple[Remedy, ...] = ()
    """What would have to give; empty when the plan fits."""

    @property
    def fits(self) -> bool:
        """Whether the predicted peak, without what the system can take back, leaves the reserve free."""
        needed = self.ledger.predicted_peak_bytes - self.ledger.reclaimable_bytes
        return needed + self.reserve_bytes <= self.hardware.memory_bytes

    @property
    def predicted_peak_bytes(self) -> int:
        """On the device: see ``Ledger.predicted_peak_bytes``."""
        return self.ledger.predicted_peak_bytes

    @property
    def micro_batch(self) -> int:
        """Rows that go through the model at once."""
        return self.setting.micro_batch

    @property
    def accumulation(self) -> int:
        """Micro-batches an optimizer step."""
        return self.batch_size // self.setting.micro_batch

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether transformers itself recomputes the layers; the fast engine does that on its own."""
        return self.setting.engine != "fast" and self.setting.recompute_all > 0

    @property
    def optimizer(self) -> str:
        """transformers' name of the optimizer."""
        return _TRANSFORMERS_OPTIMIZER[self.setting.optimizer]


def default_reserve(hardware: Hardware) -> int:
    """Bytes left free by default: 2 % of a card's memory, 10 % of a host's."""
    return hardware.memory_bytes // (50 if hardware.device == "cuda" else 10)


def plan_for(recipe: Recipe, shape: ModelShape, hardware: Hardware, shards: int = 1) -> Plan:
    """The plan to train with. Raises TrainingError saying what would have to give when nothing fits."""
    made = plan(shape, recipe, hardware, shards=shards)
    if not made.fits:
        raise does_not_fit(made)
    return made


def plan_with_less(current: Plan, recipe: Recipe) -> Plan:
    """The best plan that needs noticeably less than ``current``, which did not fit after all.

    Raises TrainingError saying what would have to give when there is none.
    """
    needed = current.predicted_peak_bytes - current.ledger.reclaimable_bytes
    # Of a tiny run on a large card the reserve may be more than all that it needs.
    less = min(default_reserve(current.hardware), needed // 10) if current.hardware.device == "cuda" else 1
    memory = max(1, needed + current.reserve_bytes - less)
    smaller = current.hardware.model_copy(update={"memory_bytes": memory})
    made = plan(current.shape, recipe, smaller, current.reserve_bytes)
    if not made.fits:
        raise TrainingError(
            f"does not fit: memory ran out at {needed / GIB:.2f} GiB predicted, and no plan needs less; the "
            f"device has less free than its {current.hardware.memory_bytes / GIB:.2f} GiB",
            "; or ".join(["end what else uses it", *(remedy.change for remedy in made.remedies)]),
        )
    return replace(made, hardware=current.hardware)


def does_not_fit(made: Plan) -> TrainingError:
    """The error for a plan that does not fit: how much is missing, and what would have to give."""
    memory, reserve = made.hardware.memory_bytes, made.reserve_bytes
    peak = made.predicted_peak_bytes - made.ledger.reclaimable_bytes
    enough = math.ceil(peak / (1 - reserve / memory) / GIB)  # its reserve grows with it
    ways = [remedy.change for remedy in made.remedies]
    return TrainingError(
        f"does not fit: {peak / GIB:.2f} GiB are needed at the least, and of {memory / GIB:.2f} GiB "
        f"{reserve / GIB:.2f} stay in reserve",
        "; or ".join([*ways, f"use a device with at least {enough} GiB"]),
    )


def plan(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, reserve: int | None = None, *, shards: int = 1
) -> Plan:
    """Choose micro-batch, recomputation and optimizer for ``recipe`` on ``hardware``.

    What the recipe fixes is kept. ``reserve`` bytes stay free (see ``default_reserve``); ``shards`` devices
    hold a part each of base and adapter (FSDP). When nothing fits, the cheapest setting in memory is returned
    with ``fits`` false and ``remedies`` saying what would have to give. Raises RecipeError when the recipe
    targets modules that the shape does not have, or the reserve leaves nothing.
    """
    reserve = default_reserve(hardware) if reserve is None else reserve
    if reserve >= hardware.memory_bytes:
        raise RecipeError(
            f"a reserve of {reserve / GIB:.4g} GiB leaves nothing of {hardware.memory_bytes / GIB:.4g} GiB",
            "reserve less",
        )
    fitting = [
        (setting, found)
        for setting in _candidates(shape, recipe, hardware, reserve, shards)
        for found in [ledger(shape, recipe, hardware, setting)]
        if _room(found, hardware, reserve) >= 0 and host_holds(found, hardware, setting)
    ]
    if fitting:
        setting, found = min(fitting, key=lambda item: _preference(shape, recipe, hardware, *item))
        return _plan(shape, recipe, hardware, reserve, setting, found)
    made = _plan(shape, recipe, hardware, reserve, *smallest(shape, recipe, hardware, shards))
    room = hardware.memory_bytes - reserve
    return replace(made, remedies=tuple(remedies(shape, recipe, hardware, room, shards)))


def _plan(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, reserve: int, setting: Setting, found: Ledger
) -> Plan:
    return Plan(
        shape=shape,
        hardware=hardware,
        setting=setting,
        ledger=found,
        batch_size=recipe.training.batch_size,
        reserve_bytes=reserve,
        choices=tuple(
            explain(shape, recipe, hardware, setting, found, fits=_room(found, hardware, reserve) >= 0)
        ),
    )


def _room(found: Ledger, hardware: Hardware, reserve: int) -> int:
    return hardware.memory_bytes - reserve - (found.predicted_peak_bytes - found.reclaimable_bytes)


def _candidates(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, reserve: int, shards: int
) -> Iterator[Setting]:
    """For each micro-batch and optimizer the least recomputation that fits; memory falls along the list of
    them.
    """
    engine = engine_for(shape, recipe, hardware)
    steps = recomputations(shape, recipe, engine, hardware.device)
    for rows in micro_batches(recipe):
        for optimizer in optimizers(recipe, hardware, engine, shards):
            for offload in (False, True) if may_offload(engine, steps) else (False,):
                settings = [
                    Setting(rows, optimizer, engine, whole, mlp, offload and whole > 0, shards=shards)
                    for whole, mlp in steps
                ]
                least = settings[_first(settings, lambda s: _fits(shape, recipe, hardware, reserve, s))]
                yield least
                kept = _layers_to_keep(shape, recipe, hardware, reserve, least)
                if kept:
                    yield replace(least, kept_weights=kept)


def _layers_to_keep(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, reserve: int, setting: Setting
) -> int:
    """Layers whose dequantized weights fit into what ``setting`` leaves free; none where a step has one
    micro-batch, and where dropout keeps adapters and weights apart.
    """
    one_pass = setting.micro_batch >= recipe.training.batch_size
    if setting.engine != "fast" or one_pass or recipe.lora.dropout:
        return 0
    before, after = (
        ledger(shape, recipe, hardware, replace(setting, kept_weights=kept)).predicted_peak_bytes
        for kept in (0, 1)
    )
    room = hardware.memory_bytes - reserve - before
    return max(0, min(shape.layers, room // (after - before)))


def _fits(shape: ModelShape, recipe: Recipe, hardware: Hardware, reserve: int, setting: Setting) -> bool:
    return _room(ledger(shape, recipe, hardware, setting), hardware, reserve) >= 0


def _first(settings: list[Setting], fits: Callable[[Setting], bool]) -> int:
    """Index of the first setting that fits, by bisection; the last when none does."""
    low, high = 0, len(settings) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(settings[middle]):
            high = middle
        else:
            low = middle + 1
    return low


def _preference(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting, found: Ledger
) -> tuple[float, ...]:
    """Smaller is better."""
    if hardware.device == "cpu":
        tokens = setting.micro_batch * recipe.data.max_length
        return (float(max(0, CPU_TOKENS - tokens)), float(setting.micro_batch))
    return (_seconds_a_token(shape, recipe, hardware, setting), float(found.predicted_peak_bytes))


def _seconds_a_token(shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting) -> float:
    flops, bandwidth = next((rate for name, rate in _RATES.items() if name in hardware.name), _OTHER_RATE)
    weights = sum(linear.weights for linear in shape.linears)  # of one layer
    last = shape.linears[-1].weights  # never computed again: nothing in its layer's backward needs it
    mlp = sum(linear.weights for linear in shape.linears if linear.path.startswith("mlp.")) - last
    again = setting.recompute_all * (weights - last) + setting.recompute_mlp * mlp
    passes = 2 * weights * shape.layers + again  # weights that products go through: forward, backward, again
    tokens = setting.micro_batch * recipe.data.max_length
    spared = setting.kept_weights / shape.layers * (1 - setting.micro_batch / recipe.training.batch_size)
    moved = passes * (_DEQUANTIZE_BYTES * (1 - spared) + _READ_BYTES * spared)
    seconds = 2 * passes / flops + moved / bandwidth / tokens
    if setting.offload:
        seconds *= _OFFLOAD_SLOWDOWN
    if setting.optimizer != "adamw":
        moved = (6 if setting.optimizer == "paged_adamw_8bit" else 12) * adapter_weights(shape, recipe.lora)
        seconds += moved / _BUS / (recipe.training.batch_size * recipe.data.max_length)
    return seconds
