"""plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from adapterhub.packaging.manifest import Hardware
    from adapterhub.trainer.plan import Plan
    from adapterhub.trainer.recipe import Recipe
    from adapterhub.trainer.shapes import ModelShape


@click.command("plan")
@click.argument("base", metavar="BASE|RECIPE.yaml")
@click.option("--gpu", metavar="SIZE", help="A card to plan for, like 48GiB. Default (auto): this machine.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, like lora.rank=64.",
)
@click.option(
    "--reserve", metavar="SIZE", help="Memory to leave free. Default: 2 % of a card, 10 % of a host."
)
@click.option("--endpoint", help="The Hub's address. Default: HF_ENDPOINT, or huggingface.co.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plan_command(
    base: str,
    gpu: str | None,
    overrides: tuple[str, ...],
    reserve: str | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Say, before any weight is loaded, whether a run fits, and how it would be run.

    BASE is the folder of a checkpoint or owner/name[@revision] on the Hub; only its config.json is read. A
    recipe is planned for its own base, rank and length. Exits 6 when nothing fits, after saying what would
    have to give.
    """
    from adapterhub.trainer.hardware import parse_size
    from adapterhub.trainer.plan import does_not_fit, plan

    recipe = _recipe(base, overrides)
    left_free = None if reserve is None else parse_size(reserve)
    hardware = _hardware(gpu)
    shape = _shape(recipe, endpoint)
    made = plan(shape, recipe, hardware, left_free)
    if as_json:
        click.echo(json.dumps(_document(made), indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=False)
        with console.capture() as text:  # rich would end the process itself when nobody reads on
            _print(made, recipe, console)
        click.echo(text.get(), nl=False)
    if not made.fits:
        raise does_not_fit(made)


def _recipe(base: str, overrides: tuple[str, ...]) -> Recipe:
    """The recipe in a YAML file, or the default one for a base."""
    from adapterhub.trainer.recipe import Recipe

    if base.endswith((".yaml", ".yml")) or Path(base).is_file():
        return Recipe.read(base, overrides)
    content: dict[str, Any] = {"name": "plan", "base": base, "data": {"train": "rows.jsonl"}}
    return Recipe.from_dict(content, Path.cwd(), "plan", overrides)


def _hardware(gpu: str | None) -> Hardware:
    from adapterhub.trainer.hardware import described_gpu, detect_hardware, parse_size

    return detect_hardware() if gpu in (None, "auto") else described_gpu(parse_size(str(gpu)))


def _shape(recipe: Recipe, endpoint: str | None) -> ModelShape:
    from adapterhub.trainer.shapes import read_shape

    source = recipe.resolve(recipe.base)
    if isinstance(source, Path):
        if not source.is_dir():
            raise RecipeError(
                f"{source} is a file, not the folder of a checkpoint", "name its folder, or a .yaml recipe"
            )
        return read_shape(source / "config.json")
    from adapterhub.hub.bases import fetch_config

    return read_shape(fetch_config(source, endpoint=endpoint))


def _document(made: Plan) -> dict[str, Any]:
    """The plan as one JSON document."""
    hardware, setting, shape = made.hardware, made.setting, made.shape
    return {
        "fits": made.fits,
        "hardware": hardware.model_dump(),
        "model": {
            "model_type": shape.model_type,
            "parameters": shape.parameters,
            "quantized_weights": shape.quantized_weights,
            "layers": shape.layers,
            "linear_modules": [linear.path for linear in shape.linears],
        },
        "setting": {
            "micro_batch": made.micro_batch,
            "accumulation": made.accumulation,
            "layers_recomputed": setting.recompute_all,
            "layers_with_mlp_recomputed": setting.recompute_mlp,
            "inputs_offloaded": setting.offload,
            "layers_kept_dequantized": setting.kept_weights,
            "optimizer": setting.optimizer,
            "engine": setting.engine,
        },
        "choices": [vars(choice) for choice in made.choices],
        "ledger": [part.model_dump() for part in made.ledger.parts],
        "predicted_peak_bytes": made.predicted_peak_bytes,
        "reclaimable_bytes": made.ledger.reclaimable_bytes,
        "host_bytes": made.ledger.host_bytes,
        "reserve_bytes": made.reserve_bytes,
        "remedies": [vars(remedy) for remedy in made.remedies],
    }


def _print(made: Plan, recipe: Recipe, console: Console) -> None:
    """The plan for a reader: what it is planned for, the ledger, the choices, the verdict."""
    from rich.table import Table

    gib = 2**30
    hardware, shape = made.hardware, made.shape
    kind = "GPU" if hardware.device == "cuda" else "CPU, in host memory"
    console.print(
        f"{recipe.base}: {shape.model_type}, {shape.parameters / 1e9:.3g} B parameters, on {hardware.name} "
        f"({kind}, {hardware.memory_bytes / gib:.1f} GiB)",
        markup=False,
    )
    table = Table(title="Memory, predicted", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("how it is computed", overflow="fold")
    for part in made.ledger.parts:
        name = part.name if part.on == "device" else f"{part.name} (host)"
        table.add_row(name, f"{part.bytes / gib:.3f}", part.formula)
    table.add_section()
    table.add_row("peak", f"{made.predicted_peak_bytes / gib:.3f}", "sum of the parts on the device")
    table.add_row("reserve", f"{made.reserve_bytes / gib:.3f}", "left free")
    console.print(table)
    for choice in made.choices:
        console.print(f"{choice.name}: {choice.value} ({choice.why})", markup=False)
    if made.fits:
        needed = made.predicted_peak_bytes - made.ledger.reclaimable_bytes + made.reserve_bytes
        console.print(f"fits: {(hardware.memory_bytes - needed) / gib:.1f} GiB left beside the reserve")
    else:
        console.print(
            "does not fit; each of these alone would make it fit:" if made.remedies else "does not fit"
        )
        for remedy in made.remedies:
            console.print(f"  {remedy.change} (peak {remedy.peak_bytes / gib:.1f} GiB)", markup=False)
