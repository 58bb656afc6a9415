"""merge, requantize."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from adapterhub.commands.bars import bytes_bar
from adapterhub.commands.combining import combining_options, read_combination
from adapterhub.commands.comparing import describe_evidence, load_side
from adapterhub.commands.judging import Judge, Measuring, RoundingChoice, measuring_options, read_measuring
from adapterhub.commands.picking import merge_best
from adapterhub.commands.references import Ingredients
from adapterhub.commands.targets import base_mismatch_option, find_folder, locate_base, open_checked
from adapterhub.errors import RecipeError
from adapterhub.packaging.files import check_target

if TYPE_CHECKING:
    from adapterhub.packaging.combination import Combine
    from adapterhub.packaging.evidence import FidelityEvidence, RoundingEvidence
    from adapterhub.packaging.layout import Storage
    from adapterhub.packaging.merge import MergeReport, Onto
    from adapterhub.packaging.release import Release
    from adapterhub.packaging.requantize import RequantizeReport

    Merging = Callable[[Path, Onto, Judge | None], MergeReport]

_ASSUMED = "does not say how its base was quantized: taking NF4, double, blocks of 64"


@click.command("merge")
@click.argument("adapter", metavar="RELEASE|REF|ADAPTER")
@click.option(
    "--to",
    "storage",
    required=True,
    type=click.Choice(["bf16", "nf4", "fp4", "int8"]),
    help="What the linear layers are stored as: bfloat16, or quantized as bitsandbytes has them.",
)
@click.option(
    "--onto",
    required=True,
    type=click.Choice(["original", "trained", "auto"]),
    help="The base's 16-bit weights, or what 4-bit quantization made of them: what training saw. auto makes "
    "both and keeps the one that finds held-out text likelier.",
)
@click.option(
    "--base", metavar="DIR|REF", help="The base model. Default: the one the release names, from the Hub."
)
@base_mismatch_option
@measuring_options
@combining_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def merge_command(
    adapter: str,
    storage: Storage,
    onto: Literal["original", "trained", "auto"],
    base: str | None,
    allow_base_mismatch: str | None,
    text: Path | None,
    held_out: Path | None,
    rounding: RoundingChoice | None,
    max_kl: float | None,
    no_fidelity: bool,
    others: tuple[str, ...],
    weight: float | None,
    combine: Combine | None,
    density: float | None,
    seed: int | None,
    out: Path,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Merge an adapter into its base: a checkpoint that transformers loads alone.

    The adapter is a release (a folder, or owner/name[@version]) or a plain PEFT folder, which needs --base.
    The base must be the one that the release names. Streams: memory does not grow with the model.
    nf4 and fp4 (blocks of 64, scales quantized too) and int8 are rounded straight from the sum; embeddings,
    head and norms stay in bfloat16. With --text, nf4 and fp4 codes are chosen so that each layer's output
    changes least on it, and the result is measured against the live 4-bit base with the adapter attached: KL,
    agreement, likelihood and layers, written to evidence/fidelity.json and held to --max-kl.
    A merge that was killed goes on where it was when the same command is run again.
    """
    from adapterhub.load import default_device
    from adapterhub.packaging.merge import merge_adapter

    check_target(out)
    if onto == "auto" and (no_fidelity or (text is None and held_out is None)):
        raise RecipeError("--onto auto picks by the likelihood of text", "name text with --text FILE")
    folder = find_folder(adapter, endpoint)
    combination = read_combination(others, weight, combine, density, seed, endpoint)
    base_folder = locate_base(base, folder, endpoint, allow_base_mismatch)
    made_of = Ingredients(folder, base_folder, combination, allow_base_mismatch)
    if onto != "original" and made_of.are_plain:
        click.echo(f"{folder} {_ASSUMED}", err=True)
    measuring = read_measuring(storage, made_of.tokenizer, text, held_out, rounding, max_kl, no_fidelity)

    def merge(target: Path, onto: Onto, judge: Judge | None) -> MergeReport:
        with bytes_bar("merging") as progress:
            return merge_adapter(
                folder,
                base_folder,
                target,
                onto=onto,
                storage=storage,
                combination=combination,
                allow_base_mismatch=allow_base_mismatch,
                calibration=measuring.calibration,
                examine=judge.examine if judge else None,
                device=default_device() if onto == "trained" or storage != "bf16" else "cpu",
                progress=progress,
            )

    report, evidence = _merge(merge, made_of, measuring, onto, storage, out)
    _tell_merge(report, evidence, as_json)


def _merge(
    merge: Merging,
    made_of: Ingredients,
    measuring: Measuring,
    onto: Literal["original", "trained", "auto"],
    storage: Storage,
    out: Path,
) -> tuple[MergeReport, FidelityEvidence | None]:
    if measuring.held_out is None:
        assert onto != "auto"
        return merge(out, onto, None), None
    with made_of.judging(measuring, out) as judge_for:
        if onto == "auto":
            return merge_best(merge, judge_for, made_of, measuring, storage, out)
        judge = judge_for(onto)
        return merge(out, onto, judge), judge.evidence


def _tell_merge(report: MergeReport, evidence: FidelityEvidence | None, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(_as_dict(report, evidence), indent=2))
        return
    what = (
        f"{report.release.manifest.name} {report.release.manifest.version}"
        if report.release
        else "checkpoint"
    )
    click.echo(f"{what} in {report.out}: {report.size} bytes in {report.seconds:.1f} s")
    click.echo(f"merged onto  {report.onto}, {report.merged} of {report.tensors} tensors")
    if evidence is not None and evidence.instead_of is not None:
        other, own = evidence.instead_of, evidence.figures.candidate_nll
        click.echo(
            f"picked       {report.onto}: NLL of held-out text {own:.4f}, "
            f"onto {other.onto} {other.candidate_nll:.4f}"
        )
    merge = report.release.manifest.merge if report.release else None
    if merge is not None and merge.base_mismatch is not None:
        mismatch = merge.base_mismatch
        click.echo(f"other base   {'; '.join(mismatch.differs)}, because: {mismatch.reason}")
    if report.resumed:
        click.echo(f"resumed      {report.resumed} shards were done before")
    click.echo(
        f"stored in    {report.storage}" + (f", {report.quantized} tensors" if report.quantized else "")
    )
    if report.requantized:
        click.echo(
            f"through {report.quantization.type if report.quantization else ''}  {report.requantized} tensors"
        )
    _tell_measured(report.rounding, evidence)


def _tell_measured(rounding: RoundingEvidence | None, evidence: FidelityEvidence | None) -> None:
    if rounding is not None:
        chosen = sum(error.chosen for error in rounding.weights)
        nearest = sum(error.nearest for error in rounding.weights)
        share = f"{chosen / nearest:.2f} of its output error" if nearest else "no output error to begin with"
        kept = sum(error.chosen >= error.nearest for error in rounding.weights)
        click.echo(f"codes        chosen on {rounding.texts} texts, {rounding.tokens:,} tokens: {share}")
        if kept:
            click.echo(f"nearest      kept in {kept} of {len(rounding.weights)} tensors: no better was found")
    if evidence is not None:
        click.echo(describe_evidence(evidence))


def _as_dict(report: MergeReport, evidence: FidelityEvidence | None) -> dict[str, Any]:
    return {
        "out": str(report.out),
        "to": report.storage,
        "onto": report.onto,
        "quantization": report.quantization.model_dump() if report.quantization else None,
        "tensors": report.tensors,
        "merged": report.merged,
        "requantized": report.requantized,
        "quantized": report.quantized,
        "resumed": report.resumed,
        "bytes": report.size,
        "seconds": round(report.seconds, 3),
        "release": _release_as_dict(report.release),
        **_measured_as_dict(report.rounding, evidence),
    }


def _release_as_dict(release: Release | None) -> dict[str, str] | None:
    if release is None:
        return None
    manifest = release.manifest
    return {"name": manifest.name, "version": manifest.version, "digest": release.digest}


def _measured_as_dict(rounding: RoundingEvidence | None, evidence: FidelityEvidence | None) -> dict[str, Any]:
    return {
        "rounding": rounding.model_dump(mode="json") if rounding else None,
        "fidelity": evidence.model_dump(mode="json") if evidence else None,
    }


@click.command("requantize")
@click.argument("target", metavar="RELEASE|REF")
@click.option(
    "--to",
    "storage",
    required=True,
    type=click.Choice(["nf4", "fp4", "int8"]),
    help="What the linear layers are stored as, as bitsandbytes has it.",
)
@measuring_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def requantize_command(
    target: str,
    storage: Literal["nf4", "fp4", "int8"],
    text: Path | None,
    held_out: Path | None,
    rounding: RoundingChoice | None,
    max_kl: float | None,
    no_fidelity: bool,
    out: Path,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Quantize a merged release in bf16: a release that transformers and bitsandbytes load alone.

    Streams as merge does, with the same choice of codes; what it is measured against is the merged release
    itself. Where the adapter is still at hand, merge it instead: that rounds once.
    """
    from adapterhub.load import default_device
    from adapterhub.packaging.requantize import requantize_release
    from adapterhub.trainer.model import load_tokenizer

    check_target(out)
    source = open_checked(target, endpoint)
    measuring = read_measuring(
        storage, partial(load_tokenizer, source.path), text, held_out, rounding, max_kl, no_fidelity
    )
    judge = None
    if measuring.held_out is not None:
        judge = Judge(measuring, lambda mismatches: load_side(str(source.path), None, None, None, mismatches))
    with bytes_bar("quantizing") as progress:
        report = requantize_release(
            source,
            out,
            storage=storage,
            calibration=measuring.calibration,
            examine=judge.examine if judge else None,
            device=default_device(),
            progress=progress,
        )
    evidence = judge.evidence if judge else None
    if as_json:
        click.echo(json.dumps(_requantized_as_dict(report, evidence), indent=2))
        return
    manifest = report.release.manifest
    click.echo(f"{manifest.name} {manifest.version} in {out}: {report.size} bytes in {report.seconds:.1f} s")
    click.echo(f"stored in    {storage}, {report.quantized} of {report.tensors} tensors")
    if report.resumed:
        click.echo(f"resumed      {report.resumed} shards were done before")
    _tell_measured(report.rounding, evidence)


def _requantized_as_dict(report: RequantizeReport, evidence: FidelityEvidence | None) -> dict[str, Any]:
    return {
        "out": str(report.release.path),
        "to": report.storage,
        "tensors": report.tensors,
        "quantized": report.quantized,
        "resumed": report.resumed,
        "bytes": report.size,
        "seconds": round(report.seconds, 3),
        "release": _release_as_dict(report.release),
        **_measured_as_dict(report.rounding, evidence),
    }
