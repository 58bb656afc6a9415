"""What a recipe leaves the planner free to choose, and the choice that needs the least memory."""

from __future__ import annotations

from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.activations import Engine, Optimizer, Setting
from adapterhub.trainer.engines import engine_for
from adapterhub.trainer.ledger import Ledger, ledger
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import ModelShape


def micro_batches(recipe: Recipe) -> list[int]:
    """What the recipe allows, largest first: whole parts of the batch."""
    fixed, batch = recipe.training.micro_batch, recipe.training.batch_size
    return [fixed] if fixed != "auto" else [rows for rows in range(batch, 0, -1) if batch % rows == 0]


def optimizers(recipe: Recipe, hardware: Hardware, engine: Engine, shards: int) -> list[Optimizer]:
    """What the recipe allows, smallest on the device last."""
    wanted = recipe.training.optimizer
    if wanted != "auto":
        return [wanted]
    if hardware.device == "cpu" or shards > 1:
        return ["adamw"]
    return ["paged_adamw"] if engine == "plain" else ["adamw", "paged_adamw"]


def recomputations(shape: ModelShape, recipe: Recipe, engine: Engine, device: str) -> list[tuple[int, int]]:
    """(layers recomputed whole, layers with the MLP recomputed), fastest first, smallest in memory last."""
    layers, wanted = shape.layers, recipe.training.gradient_checkpointing
    if wanted is True:
        return [(layers, 0)]
    if wanted is False or device == "cpu":
        return [(0, 0)]
    if engine != "fast":
        return [(0, 0), (layers, 0)]
    return [(0, mlp) for mlp in range(layers + 1)] + [
        (whole, layers - whole) for whole in range(1, layers + 1)
    ]


def may_offload(engine: Engine, steps: list[tuple[int, int]]) -> bool:
    """Whether inputs can wait on the host: of layers that the fast engine recomputes whole."""
    return engine == "fast" and steps[-1][0] > 0


def host_holds(found: Ledger, hardware: Hardware, setting: Setting) -> bool:
    """Offloading is a choice only where the host, taken to have the card's memory at least, holds it all."""
    return not setting.offload or found.host_bytes <= hardware.memory_bytes


def smallest(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, shards: int = 1
) -> tuple[Setting, Ledger]:
    """The setting with the smallest peak that the recipe allows, and its ledger."""
    engine = engine_for(shape, recipe, hardware)
    steps = recomputations(shape, recipe, engine, hardware.device)
    whole, mlp = steps[-1]
    optimizer = optimizers(recipe, hardware, engine, shards)[-1]
    found = []
    for offload in (False, True) if may_offload(engine, steps) else (False,):
        setting = Setting(micro_batches(recipe)[-1], optimizer, engine, whole, mlp, offload, shards=shards)
        found.append((setting, ledger(shape, recipe, hardware, setting)))
    held = [pair for pair in found if host_holds(pair[1], hardware, pair[0])]
    return min(held, key=lambda pair: pair[1].predicted_peak_bytes)
