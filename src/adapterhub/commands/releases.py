"""inspect, merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    from adapterhub.packaging.merge import MergeReport


@click.command("merge")
@click.argument("adapter", metavar="RELEASE|REF|ADAPTER")
@click.option(
    "--to", "dtype", required=True, type=click.Choice(["bf16"]), help="What the merged weights are stored as."
)
@click.option(
    "--onto",
    required=True,
    type=click.Choice(["original", "trained"]),
    help="The base's 16-bit weights, or what 4-bit quantization made of them: what training saw.",
)
@click.option(
    "--base", metavar="DIR|REF", help="The base model. Default: the one the release names, from the Hub."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def merge_command(
    adapter: str,
    dtype: str,
    onto: Literal["original", "trained"],
    base: str | None,
    out: Path,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Merge an adapter into its base: a checkpoint that transformers loads alone.

    The adapter is a release (a folder, or owner/name[@version]) or a plain PEFT folder, which needs --base.
    The base must be the one that the release names. Streams: memory does not grow with the model.
    """
    from adapterhub.packaging.manifest import MANIFEST_NAME
    from adapterhub.packaging.merge import merge_adapter

    folder = _locate(adapter, endpoint)
    if onto == "trained" and not (folder / MANIFEST_NAME).is_file():
        click.echo(
            f"{folder} does not say how its base was quantized: taking NF4, double, blocks of 64", err=True
        )
    with _bar("merging") as progress:
        report = merge_adapter(
            folder, _locate_base(base, folder, endpoint), out, onto=onto, progress=progress
        )
    if as_json:
        click.echo(json.dumps(_as_dict(report, dtype), indent=2))
        return
    what = (
        f"{report.release.manifest.name} {report.release.manifest.version}"
        if report.release
        else "checkpoint"
    )
    click.echo(f"{what} in {report.out}: {report.size} bytes in {report.seconds:.1f} s")
    click.echo(f"merged onto  {onto}, {report.merged} of {report.tensors} tensors, stored in {dtype}")
    if report.requantized:
        click.echo(
            f"through {report.quantization.type if report.quantization else ''}  {report.requantized} tensors"
        )


def _as_dict(report: MergeReport, dtype: str) -> dict[str, Any]:
    release = report.release
    return {
        "out": str(report.out),
        "to": dtype,
        "onto": report.onto,
        "quantization": report.quantization.model_dump() if report.quantization else None,
        "tensors": report.tensors,
        "merged": report.merged,
        "requantized": report.requantized,
        "bytes": report.size,
        "seconds": round(report.seconds, 3),
        "release": release
        and {"name": release.manifest.name, "version": release.manifest.version, "digest": release.digest},
    }


def _locate(release: str, endpoint: str | None) -> Path:
    """The folder of a release or an adapter; what is no folder here is looked up on the Hub."""
    if Path(release).is_dir():
        return Path(release)
    from adapterhub.load import open_release

    return open_release(release, endpoint=endpoint).path


def _locate_base(base: str | None, adapter: Path, endpoint: str | None) -> Path:
    from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest

    if base is not None and Path(base).is_dir():
        return Path(base)
    lock = Manifest.read(adapter).base if (adapter / MANIFEST_NAME).is_file() else None
    if base is None and lock is None:
        raise ReleaseError(f"{adapter} does not bind a base", "name it with --base")
    from adapterhub.load import find_base

    return find_base(lock, base, endpoint=endpoint)


@contextmanager
def _bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of bytes on stderr, when that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(words), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(words, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
