"""merge, requantize."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from adapterhub.commands.bars import bytes_bar
from adapterhub.commands.combining import combining_options, read_combination
from adapterhub.commands.comparing import Side, describe_evidence, load_side, measure_kept
from adapterhub.commands.judging import (
    Judge,
    Measuring,
    RoundingChoice,
    check_kl,
    measuring_options,
    pick,
    read_measuring,
)
from adapterhub.commands.targets import base_mismatch_option, find_folder, locate_base, open_checked
from adapterhub.errors import RecipeError
from adapterhub.packaging.files import check_target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adapterhub.packaging.combination import Combine
    from adapterhub.packaging.evidence import FidelityEvidence, RoundingEvidence
    from adapterhub.packaging.layout import Storage
    from adapterhub.packaging.manifest import BaseMismatch
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
    A merge that was killed goes on where it was when the same command is run again (--onto auto begins anew).
    """
    from adapterhub.load import default_device
    from adapterhub.packaging.manifest import MANIFEST_NAME
    from adapterhub.packaging.merge import merge_adapter

    check_target(out)
    folder = find_folder(adapter, endpoint)
    is_release = (folder / MANIFEST_NAME).is_file()
    if onto != "original" and not is_release:
        click.echo(f"{folder} {_ASSUMED}", err=True)
    combination = read_combination(others, weight, combine, density, seed, endpoint)
    if combination is not None:
        no_fidelity = _without_reference(onto, max_kl, no_fidelity)
    if onto == "auto" and (no_fidelity or (text is None and held_out is None)):
        raise RecipeError("--onto auto picks by the likelihood of text", "name text with --text FILE")
    base_folder = locate_base(base, folder, endpoint, allow_base_mismatch)
    tokenizer = partial(_tokenizer, folder, base_folder)
    measuring = read_measuring(storage, tokenizer, text, held_out, rounding, max_kl, no_fidelity)

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

    judges = partial(_judge, folder, base_folder, is_release, measuring, allow_base_mismatch)
    if onto == "auto":
        report, evidence = _merge_best(merge, judges, measuring, out)
    else:
        report, evidence = _merge_once(merge, judges, measuring, onto, out)
    _tell_merge(report, evidence, as_json)


def _without_reference(onto: str, max_kl: float | None, no_fidelity: bool) -> bool:
    """Several adapters have no live model to be measured against: refuse what needs one, else say so."""
    if max_kl is not None or onto == "auto":
        raise RecipeError(
            "several adapters together have no live model to measure the result against",
            "name --onto original or trained, and no --max-kl",
        )
    if not no_fidelity:
        click.echo("not measured: several adapters together have no live model as reference", err=True)
    return True


def _tokenizer(adapter: Path, base: Path) -> PreTrainedTokenizerBase:
    """The adapter's, where it has one, else the base's: as the result will have it."""
    from adapterhub.trainer.model import load_tokenizer

    own = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return load_tokenizer(adapter if own else base)


def _judge(
    adapter: Path,
    base: Path,
    is_release: bool,
    measuring: Measuring,
    allow_base_mismatch: str | None,
    onto: Onto,
) -> Judge:
    def live(mismatches: list[BaseMismatch]) -> Side:
        from adapterhub.load import load_plain

        if is_release:
            return load_side(str(adapter), str(base), None, allow_base_mismatch, mismatches)
        return Side(adapter.resolve().name, adapter, None, load_plain(adapter, base), None)

    def kept(reference: Side, model: Any) -> float | None:
        return measure_kept(adapter, reference.model, base if onto == "original" else None, model)

    return Judge(measuring, live, kept)


def _merge_once(
    merge: Merging, judges: Callable[[Onto], Judge], measuring: Measuring, onto: Onto, out: Path
) -> tuple[MergeReport, FidelityEvidence | None]:
    judge = judges(onto) if measuring.held_out else None
    report = merge(out, onto, judge)
    return report, judge.evidence if judge else None


def _merge_best(
    merge: Merging, judges: Callable[[Onto], Judge], measuring: Measuring, out: Path
) -> tuple[MergeReport, FidelityEvidence | None]:
    """Merge onto both targets, and give ``out`` to the one with the lower NLL of the held-out text."""
    from adapterhub.packaging.evidence import FIDELITY, to_json
    from adapterhub.packaging.files import publish_folder
    from adapterhub.packaging.release import Release
    from adapterhub.packaging.temporary import scratch_beside

    reports: dict[str, MergeReport] = {}
    found: dict[str, FidelityEvidence] = {}
    with scratch_beside(out) as beside:
        targets: tuple[Onto, Onto] = ("trained", "original")
        for onto in targets:
            click.echo(f"trying --onto {onto}", err=True)
            judge = judges(onto)
            judge.limited = False
            reports[onto] = merge(beside / onto, onto, judge)
            assert judge.evidence is not None
            found[onto] = judge.evidence
        best, evidence = pick(found)
        check_kl(evidence, measuring.max_kl)
        if reports[best].release is not None:
            Release.open(beside / best).with_files({FIDELITY: to_json(evidence)})
        else:
            (beside / best / FIDELITY).write_bytes(to_json(evidence))
        publish_folder(beside / best, out)
    report = reports[best]
    return replace(report, out=out, release=Release.open(out) if report.release else None), evidence


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
