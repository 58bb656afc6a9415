"""inspect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.targets import find_folder

if TYPE_CHECKING:
    from adapterhub.packaging.inspection import Inspection
    from adapterhub.packaging.manifest import Quantization


@click.command("inspect")
@click.argument("release", metavar="PATH|REF")
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect_command(release: str, endpoint: str | None, as_json: bool) -> None:
    """Say what a release (a folder, or owner/name[@version]) or a plain PEFT adapter is.

    Tells what its files say, and loads and hashes nothing: `adapterhub verify` checks that it is true.
    """
    from adapterhub.packaging.inspection import inspect_folder

    inspection = inspect_folder(find_folder(release, endpoint))
    if as_json:
        click.echo(json.dumps(inspection.to_dict(), indent=2))
        return
    for label, text in (
        *_what(inspection),
        *_made_from(inspection),
        *_measured(inspection),
        *_files(inspection),
    ):
        # What a stranger wrote must not move the cursor or colour the terminal.
        shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
        click.echo(f"{label:<12} {shown}".rstrip())


def _what(inspection: Inspection) -> Iterator[tuple[str, str]]:
    manifest, adapter = inspection.manifest, inspection.adapter
    if manifest is None:
        yield "adapter", f"{inspection.path.name} (a plain PEFT folder)"
        yield "not known", "version, base digest, recipe, data, who made it: there is no adapterhub.json"
    else:
        yield "release", f"{manifest.name} {manifest.version}"
        yield "kind", manifest.kind + (f", onto {manifest.merge.onto}" if manifest.merge else "")
        yield "digest", str(inspection.digest)
        yield "created", f"{manifest.created:%Y-%m-%d %H:%M:%S} UTC"
        yield "task", manifest.task or "not said"
        yield "licence", manifest.licence or "not said"
    yield "signature", "present, not checked (adapterhub verify does)" if inspection.signed else "none"
    if adapter is None:
        yield "parameters", f"{inspection.parameters:,}"
        return
    yield "parameters", f"{adapter.parameters:,} in {adapter.modules} modules, {', '.join(adapter.dtypes)}"
    yield "rank", f"{_numbers(adapter.ranks)}, scale {_numbers(adapter.scales)}"
    yield "targets", ", ".join(adapter.targets)
    for obstacle in adapter.merge_obstacles:
        yield "no merge", obstacle
    for obstacle in adapter.vllm_obstacles:
        yield "no vLLM", obstacle
    if not adapter.vllm_obstacles:
        yield "vLLM", f"serves it with --enable-lora --max-lora-rank {adapter.vllm_rank}"


def _made_from(inspection: Inspection) -> Iterator[tuple[str, str]]:
    manifest = inspection.manifest
    if manifest is None:
        named = inspection.adapter and inspection.adapter.base
        yield "base", f"{named} (named, not bound by a digest)" if named else "not said"
        return
    if manifest.base is not None:
        base, quantization = manifest.base, manifest.base.quantization
        yield "base", base.name + (f" at {base.revision}" if base.revision else "")
        yield "base digest", f"{base.digest} over {len(base.weights)} weight files"
        yield "base in", _quantized(quantization) if quantization else "bf16, not quantized"
    if manifest.parent is not None:
        yield "parent", f"{manifest.parent.ref}, digest {manifest.parent.manifest_sha256}"
    for data in manifest.datasets:
        yield "data", f"{data.split}: {data.rows} rows of {data.source}, licence {data.licence or 'not said'}"
    for line in _recipe_lines(manifest.recipe or {}):
        yield "recipe", line
    yield "made with", ", ".join(f"{name} {found}" for name, found in manifest.tools.items()) or "not said"
    if manifest.hardware is not None:
        yield "made on", f"{manifest.hardware.count} × {manifest.hardware.name}"


def _measured(inspection: Inspection) -> Iterator[tuple[str, str]]:
    curve, scores = inspection.curve, inspection.scores
    if curve is not None:
        yield "trained", f"{curve.steps} steps, {curve.train_tokens:,} tokens, {curve.seconds:.0f} s"
    if scores is None:
        yield "scores", "not measured"
    else:
        for score in scores.scores:
            figures = f"base {score.base:.4g}, adapter {score.adapter:.4g} ({score.unit}, {score.rows} rows)"
            yield "scores", f"{score.metric}: {figures}"
        if not inspection.scores_are_of_these_weights:
            yield "scores", "of other weights than these"
    found = inspection.failures
    yield "failures", "not looked for" if found is None else f"{found} recorded cases"


def _files(inspection: Inspection) -> Iterator[tuple[str, str]]:
    yield "files", f"{len(inspection.files)}, {inspection.size:,} bytes"
    width = max((len(f"{file.size:,}") for file in inspection.files), default=0)
    for file in inspection.files:
        remark = "" if file.state in ("as listed", "found") else f"  {file.state}"
        yield "", f"{file.size:>{width},}  {file.path}{remark}"


def _quantized(quantization: Quantization) -> str:
    double = ", scales quantized" if quantization.double else ""
    dtype = quantization.compute_dtype
    return f"{quantization.type}, blocks of {quantization.block_size}{double}, computing in {dtype}"


def _recipe_lines(recipe: dict[str, Any]) -> Iterator[str]:
    """The recipe's own settings a line, its sections one line each."""
    sections = {key: value for key, value in recipe.items() if isinstance(value, dict)}
    plain = {key: value for key, value in recipe.items() if key not in sections}
    if plain:
        yield ", ".join(f"{key} {value}" for key, value in plain.items())
    for name, section in sections.items():
        yield f"{name}: " + ", ".join(f"{key} {value}" for key, value in section.items())


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
