"""fidelity."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.commands.comparing import (
    MeasuredText,
    Side,
    describe_evidence,
    load_side,
    measure_fidelity,
    measure_kept,
)
from adapterhub.commands.targets import base_mismatch_option, cached_ref
from adapterhub.errors import ManifestError

if TYPE_CHECKING:
    from adapterhub.packaging.evidence import FidelityEvidence, OtherTarget
    from adapterhub.packaging.manifest import BaseLock, BaseMismatch

    FindBase = Callable[[BaseLock | None], Path]


@click.command("fidelity")
@click.argument("reference", metavar="A")
@click.argument("candidate", metavar="B")
@click.option(
    "--text", required=True, type=click.Path(path_type=Path), help="Rows like test.jsonl, or plain text."
)
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first so many rows or windows.")
@click.option("--base", metavar="DIR|REF", help="The base of an adapter release. Default: the one it names.")
@base_mismatch_option
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def fidelity_command(
    reference: str,
    candidate: str,
    text: Path,
    limit: int | None,
    base: str | None,
    allow_base_mismatch: str | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Measure how faithfully model B stands in for model A, on every token of a text.

    A and B are releases (a folder, or owner/name[@version]) or checkpoint folders. An adapter release runs
    live: its base as it was quantized in training, with the adapter attached. When B is the folder of a
    release that is not signed, the figures are written into it, as evidence/fidelity.json.
    """
    from adapterhub.load import find_base
    from adapterhub.packaging.evidence import FIDELITY, to_json
    from adapterhub.trainer.texts import read_texts

    mismatches: list[BaseMismatch] = []
    find = partial(
        find_base,
        base=base,
        endpoint=endpoint,
        allow_mismatch=allow_base_mismatch,
    )
    a, b = (
        load_side(target, base, endpoint, allow_base_mismatch, mismatches)
        for target in (reference, candidate)
    )
    texts = read_texts(text, a.tokenizer, limit=limit)
    survival = _survival(a, b, find)  # before the first forward
    evidence = measure_fidelity(a, b, MeasuredText(text, texts, limit=limit), survival)
    evidence = evidence.model_copy(update={"base_mismatch": next(iter(mismatches), None)})
    click.echo(_as_json(evidence) if as_json else describe_evidence(evidence))
    if b.release is None or not Path(candidate).is_dir() or cached_ref(Path(candidate)) is not None:
        return
    if b.release.is_signed:
        click.echo(f"{b.folder} is signed, so {FIDELITY} was not written into it", err=True)
        return
    if _chosen_on(b.folder, evidence):
        click.echo(
            f"codes of {b.folder} were chosen on {text}, so {FIDELITY} was not written into it: other text "
            "says what the merge lost",
            err=True,
        )
        return
    evidence = evidence.model_copy(update={"instead_of": _picked_over(b.folder, evidence)})
    b.release.with_files({FIDELITY: to_json(evidence)})


def _picked_over(folder: Path, evidence: FidelityEvidence) -> OtherTarget | None:
    """What a merge picked this over on the very same texts; on others its figures say nothing."""
    from adapterhub.packaging.evidence import FIDELITY, FidelityEvidence, read_evidence

    def measured(evidence: FidelityEvidence) -> tuple[object, ...]:
        return (
            evidence.weights_digest,
            evidence.reference_sha256,
            evidence.text_sha256,
            evidence.texts,
            evidence.skipped,
        )

    try:
        before = read_evidence(folder, FIDELITY, FidelityEvidence)
    except ManifestError:  # damaged: it is replaced
        return None
    return before.instead_of if before is not None and measured(before) == measured(evidence) else None


def _chosen_on(folder: Path, evidence: FidelityEvidence) -> bool:
    """Whether the 4-bit codes in ``folder`` were chosen on texts of the file that was measured on."""
    from adapterhub.packaging.evidence import ROUNDING, RoundingEvidence, read_evidence

    rounding = read_evidence(folder, ROUNDING, RoundingEvidence)
    return rounding is not None and rounding.text_sha256 == evidence.text_sha256


def _survival(a: Side, b: Side, find: FindBase) -> float | None:
    """Delta survival, where B was made from A by a merge; None elsewhere."""
    if a.release is None or a.release.manifest.kind != "adapter" or b.release is None:
        return None
    merged = b.release.manifest
    if merged.merge is None or merged.parent is None or merged.parent.manifest_sha256 != a.release.digest:
        return None
    if merged.merge.others:  # A is not all that was added
        return None
    folder = find(a.release.manifest.base) if merged.merge.onto == "original" else None
    return measure_kept(a.folder, a.model, folder, b.model)


def _as_json(evidence: FidelityEvidence) -> str:
    return json.dumps(evidence.model_dump(mode="json"), indent=2, ensure_ascii=False)
