"""train."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    from adapterhub.packaging.release import Release
    from adapterhub.trainer.data import Split
    from adapterhub.trainer.recipe import Recipe
    from adapterhub.trainer.train import BaseSource, DataSource


@click.command("train")
@click.argument("recipe", metavar="RECIPE.yaml", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, like training.steps=100; may stand several times.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="The release to make. Default: the recipe's name."
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of a run that was stopped.")
@click.option(
    "--endpoint", metavar="URL", help="The Hub to take base and data from, instead of $HF_ENDPOINT."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train_command(
    recipe: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Train the QLoRA adapter that RECIPE.yaml describes, and seal it as a release.

    Base and data are folders and files, or owner/name[@revision] on the Hub. The run is planned before any
    weight is loaded; checkpoints lie in OUT.run until the release is sealed. A run that was stopped goes on
    with --resume and, on the CPU, ends with the same bytes as one that never was.

    Several processes that `accelerate launch -m adapterhub train …` or torchrun starts train one adapter
    together: they share training.batch_size, which counts the rows of all. Each holds the whole base; with
    `accelerate launch --use_fsdp` they divide base, adapter and optimizer among them (FSDP2).
    """
    # Before torch starts: the ledger counts on an allocator that leaves no holes.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from adapterhub.trainer import ranks

    with ranks.together():
        release = _train(recipe, overrides, out, resume=resume, endpoint=endpoint)
        if ranks.is_first():
            click.echo(_as_json(release) if as_json else _as_text(release))


def _train(
    recipe: Path, overrides: tuple[str, ...], out: Path | None, *, resume: bool, endpoint: str | None
) -> Release:
    from adapterhub.trainer import ranks
    from adapterhub.trainer.hardware import detect_hardware
    from adapterhub.trainer.plan import plan_for
    from adapterhub.trainer.progress import SilentProgress, training_progress
    from adapterhub.trainer.recipe import Recipe
    from adapterhub.trainer.shapes import read_shape
    from adapterhub.trainer.train import train

    read = Recipe.read(recipe, overrides)
    target = out or Path(read.name)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ReleaseError(f"{target} exists already", "choose another --out, or remove it")
    data = _data(read, endpoint)
    hardware = detect_hardware()
    share = ranks.share(read, ranks.world_size())
    if ranks.shards() > 1:
        from adapterhub.trainer.sharding import check_shardable

        check_shardable(read)
    plan = plan_for(share, read_shape(_config(read, endpoint)), hardware, ranks.shards())
    base = _base(read, endpoint)
    return train(
        read,
        base,
        data,
        target,
        plan=plan,
        hardware=hardware,
        progress=training_progress() if ranks.is_first() else SilentProgress(),
        resume=resume,
        say=_say if ranks.is_first() else lambda line: None,
    )


def _say(line: str) -> None:
    click.echo(line, err=True)


def _config(recipe: Recipe, endpoint: str | None) -> Path:
    """The base's config.json, before its weights are fetched."""
    source = recipe.resolve(recipe.base)
    if isinstance(source, Path):
        return source / "config.json"
    from adapterhub.hub.bases import fetch_config

    return fetch_config(source, endpoint=endpoint)


def _base(recipe: Recipe, endpoint: str | None) -> BaseSource:
    from adapterhub.trainer.train import BaseSource

    source = recipe.resolve(recipe.base)
    if isinstance(source, Path):
        return BaseSource(source, recipe.base_name or source.resolve().name)
    from adapterhub.hub.bases import fetch_base

    fetched = fetch_base(source, endpoint=endpoint)
    return BaseSource(fetched.folder, fetched.name, fetched.revision, dict(fetched.weights))


def _data(recipe: Recipe, endpoint: str | None) -> list[DataSource]:
    """The training rows, and the held-out rows when the recipe names any."""
    sources = [_rows(recipe, recipe.data.train, "train", endpoint)]
    if recipe.data.test is not None:
        sources.append(_rows(recipe, recipe.data.test, "test", endpoint))
    return sources


def _rows(recipe: Recipe, named: str, split: Split, endpoint: str | None) -> DataSource:
    from adapterhub.trainer.data import read_rows
    from adapterhub.trainer.train import DataSource

    source = recipe.resolve(named)
    if isinstance(source, Path):
        return DataSource(read_rows(source, split), source.resolve().name, split)
    from adapterhub.hub.datasets import fetch_rows

    fetched = fetch_rows(source, split, endpoint=endpoint)
    return DataSource(read_rows(fetched.folder, split), fetched.name, split, fetched.revision)


def _as_json(release: Release) -> str:
    from adapterhub.packaging.evidence import CURVE, LEDGER

    document = {
        "release": str(release.path),
        "name": release.manifest.name,
        "version": release.manifest.version,
        "digest": release.digest,
        "curve": json.loads((release.path / CURVE).read_bytes()),
        "ledger": json.loads((release.path / LEDGER).read_bytes()),
    }
    return json.dumps(document, indent=2)


def _as_text(release: Release) -> str:
    manifest = release.manifest
    lines = [f"{manifest.name} {manifest.version} in {release.path}: {release.size} bytes"]
    lines.append(f"digest  {release.digest}")
    return "\n".join(lines)
