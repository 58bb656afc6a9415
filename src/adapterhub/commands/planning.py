"""plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.errors import RecipeError

GIB = 2**30

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from adapterhub.packaging.manifest import Hardware
    from adapterhub.trainer.examples import RunSize
    from adapterhub.trainer.plan import Plan
    from adapterhub.trainer.recipe import Recipe
    from adapterhub.trainer.shapes import ModelShape


@click.command("plan")
@click.argument("base", metavar="BASE|RECIPE.yaml")
@click.option(
    "--gpu", metavar="SIZE|auto", help="A card to plan for, like 48GiB. Default (auto): this machine."
)
@click.option(
    "--data",
    metavar="PATH|REPO",
    help="Rows to train on: says how many fit data.max_length, and what a run over them comes to.",
)
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
    data: str | None,
    overrides: tuple[str, ...],
    reserve: str | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Say, before any weight is loaded, whether a run fits, and how it would be run.

    BASE is the folder of a checkpoint or owner/name[@revision] on the Hub; only its config.json is read, and
    with --data its tokenizer. A recipe is planned for its own base, rank and length. Exits 6 when nothing
    fits, after saying what would have to give.
    """
    from adapterhub.trainer.hardware import parse_size
    from adapterhub.trainer.plan import does_not_fit, plan

    recipe = _recipe(base, overrides)
    left_free = None if reserve is None else parse_size(reserve)
    hardware = _hardware(gpu)
    shape = _shape(recipe, endpoint)
    made = plan(shape, recipe, hardware, left_free)
    size = None if data is None else _size(recipe, data, endpoint)
    if as_json:
        click.echo(json.dumps(_document(made, size), indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=False)
        with console.capture() as text:  # rich would end the process itself when nobody reads on
            _print(made, recipe, size, console)
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


def _size(recipe: Recipe, data: str, endpoint: str | None) -> RunSize:
    """What a run over the rows that ``data`` names comes to, by the base's own tokenizer."""
    from adapterhub.trainer.data import read_rows
    from adapterhub.trainer.examples import size_of_run
    from adapterhub.trainer.model import load_tokenizer
    from adapterhub.trainer.recipe import HUB_REF
    from adapterhub.trainer.vocabulary import add_tokens

    if not Path(data).exists() and HUB_REF.match(data) and not data.startswith("."):
        from adapterhub.hub.datasets import fetch_rows

        rows = read_rows(fetch_rows(data, "train", endpoint=endpoint).folder)
    else:
        rows = read_rows(data)
    base = recipe.resolve(recipe.base)
    if not isinstance(base, Path):
        from adapterhub.hub.bases import fetch_tokenizer

        base = fetch_tokenizer(base, endpoint=endpoint)
    tokenizer = load_tokenizer(base)
    add_tokens(tokenizer, recipe.lora.new_tokens)
    return size_of_run(tokenizer, recipe, rows)


def _document(made: Plan, size: RunSize | None) -> dict[str, Any]:
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
        "data": None if size is None else _size_document(size),
    }


def _size_document(size: RunSize) -> dict[str, int]:
    return {
        "examples": len(size.lengths),
        "longer_than_max_length": size.left_out,
        "longest_tokens": max(size.lengths),
        "packed_rows": size.packed_rows,
        "tokens": size.tokens,
        "steps": size.steps,
    }


def _print(made: Plan, recipe: Recipe, size: RunSize | None, console: Console) -> None:
    """The plan for a reader: what it is planned for, the ledger, the choices, the verdict."""
    hardware, shape = made.hardware, made.shape
    memory = "" if hardware.device == "cuda" else " of host memory"
    console.print(
        f"{recipe.base}: {shape.model_type}, {_in_words(shape.parameters)} parameters, on "
        f"{hardware.name} with {hardware.memory_bytes / GIB:.1f} GiB{memory}",
        markup=False,
    )
    if size is not None:
        console.print(_size_in_words(recipe, size), markup=False)
    console.print(_table(made))
    for choice in made.choices:
        console.print(f"{choice.name}: {choice.value} ({choice.why})", markup=False)
    if made.fits:
        needed = made.predicted_peak_bytes - made.ledger.reclaimable_bytes + made.reserve_bytes
        console.print(f"fits: {(hardware.memory_bytes - needed) / GIB:.2f} GiB left beside the reserve")
        return
    console.print("does not fit" + ("; any one of these would make it fit:" if made.remedies else ""))
    for remedy in made.remedies:
        cost = ""
        if size is not None and remedy.max_length is not None:
            cost = f"; leaves out {size.left_out_at(remedy.max_length):,} of {len(size.lengths):,} examples"
        console.print(f"  {remedy.change} (peak {remedy.peak_bytes / GIB:.2f} GiB{cost})", markup=False)


def _in_words(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def _table(made: Plan) -> Table:
    """The ledger, a line each part."""
    from rich.table import Table

    table = Table(title="Memory, predicted", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("how it is computed", overflow="fold")
    for part in made.ledger.parts:
        name = part.name if part.on == "device" else f"{part.name} (host)"
        table.add_row(name, f"{part.bytes / GIB:.3f}", part.formula)
    table.add_section()
    table.add_row("peak", f"{made.predicted_peak_bytes / GIB:.3f}", "sum of the parts on the device")
    table.add_row("reserve", f"{made.reserve_bytes / GIB:.3f}", "left free")
    return table


def _size_in_words(recipe: Recipe, size: RunSize) -> str:
    length = recipe.data.max_length
    held = size.packed_rows * length
    words = f"data: {len(size.lengths):,} examples, the longest of {max(size.lengths):,} tokens; "
    if size.left_out:
        words += f"{size.left_out:,} longer than data.max_length {length} are left out; "
    packed = "packed into " if recipe.data.packing else ""
    words += f"{packed}{size.packed_rows:,} rows, {size.tokens / held:.0%} full; "
    return words + f"{size.steps:,} optimizer steps of {recipe.training.batch_size} rows"
