"""``merge --onto auto``: both targets made and measured, the one that finds held-out text likelier kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.judging import Judge, Measuring, check_kl

if TYPE_CHECKING:
    from adapterhub.commands.references import Ingredients
    from adapterhub.packaging.evidence import FidelityEvidence, OtherTarget
    from adapterhub.packaging.layout import Storage
    from adapterhub.packaging.merge import MergeReport, Onto

    Merging = Callable[[Path, Onto, Judge | None], MergeReport]

# What a report holds that the finished folder does not say.
_COUNTS = ("tensors", "merged", "requantized", "quantized", "size", "resumed", "seconds")


def merge_best(
    merge: Merging,
    judge_for: Callable[[Onto], Judge],
    made_of: Ingredients,
    measuring: Measuring,
    storage: Storage,
    out: Path,
) -> tuple[MergeReport, FidelityEvidence]:
    """Merge onto both targets, and give ``out`` to the one with the lower NLL of the held-out text.

    A run that was cut off leaves its finished target and the unfinished one's files to the next. Raises
    ReleaseError when that one's KL is over the limit, and what merging raises: nothing is left then.
    """
    from adapterhub.packaging.evidence import FIDELITY, to_json
    from adapterhub.packaging.release import Release
    from adapterhub.packaging.staging import resumable_folder

    targets: tuple[Onto, Onto] = ("trained", "original")
    reports: dict[str, MergeReport] = {}
    found: dict[str, FidelityEvidence] = {}
    with resumable_folder(out, _key(made_of, measuring, storage)) as staging:
        staging.scratch.mkdir(exist_ok=True)
        for onto in targets:
            click.echo(f"trying --onto {onto}", err=True)
            reports[onto], found[onto] = _try(merge, judge_for, onto, storage, staging.scratch / onto)
        best, evidence = _pick(found)
        check_kl(evidence, measuring.max_kl)
        folder = staging.scratch / best
        if reports[best].release is not None:
            Release.open(folder).with_files({FIDELITY: to_json(evidence)})
        else:
            (folder / FIDELITY).write_bytes(to_json(evidence))
        folder.replace(staging.folder)  # which is empty
    report = reports[best]
    return replace(report, out=out, release=Release.open(out) if report.release else None), evidence


def _key(made_of: Ingredients, measuring: Measuring, storage: Storage) -> str:
    """What decides both results and what is measured of them."""
    from adapterhub.load import default_device
    from adapterhub.packaging.calibration.calibrate import note_text
    from adapterhub.packaging.checkpoint import open_checkpoint
    from adapterhub.packaging.merge import inputs_of
    from adapterhub.packaging.writing import key_of

    assert measuring.held_out is not None
    measured = json.dumps([list(ids) for ids in measuring.held_out.texts])
    inputs = inputs_of(made_of.adapter, None, storage, default_device(), made_of.combination)
    inputs |= note_text(measuring.calibration) | {"measured": sha256(measured.encode()).hexdigest()}
    return key_of(open_checkpoint(made_of.base), inputs)


def _try(
    merge: Merging, judge_for: Callable[[Onto], Judge], onto: Onto, storage: Storage, out: Path
) -> tuple[MergeReport, FidelityEvidence]:
    """One target merged and measured; what an earlier run finished is taken."""
    noted = out.with_suffix(".json")
    if not noted.is_file():  # or cut off before it was finished
        shutil.rmtree(out, ignore_errors=True)
    if out.is_dir():
        return _read(noted, onto, storage, out)
    judge = judge_for(onto)
    judge.limited = False
    report = merge(out, onto, judge)
    assert judge.evidence is not None
    noted.write_text(json.dumps({name: getattr(report, name) for name in _COUNTS} | _quantization(report)))
    return report, judge.evidence


def _quantization(report: MergeReport) -> dict[str, Any]:
    found = report.quantization
    return {"quantization": found.model_dump() if found else None}


def _read(noted: Path, onto: Onto, storage: Storage, out: Path) -> tuple[MergeReport, FidelityEvidence]:
    from adapterhub.packaging.evidence import (
        FIDELITY,
        ROUNDING,
        FidelityEvidence,
        RoundingEvidence,
        read_evidence,
    )
    from adapterhub.packaging.manifest import MANIFEST_NAME, Quantization
    from adapterhub.packaging.merge import MergeReport
    from adapterhub.packaging.release import Release

    content = json.loads(noted.read_bytes())
    through = content.pop("quantization")
    evidence = read_evidence(out, FIDELITY, FidelityEvidence)
    assert evidence is not None
    report = MergeReport(
        out=out,
        onto=onto,
        storage=storage,
        quantization=Quantization.model_validate(through) if through else None,
        release=Release.open(out) if (out / MANIFEST_NAME).is_file() else None,
        rounding=read_evidence(out, ROUNDING, RoundingEvidence),
        **content,
    )
    return report, evidence


def _pick(found: Mapping[str, FidelityEvidence]) -> tuple[str, FidelityEvidence]:
    """The target with the lowest NLL of the held-out text, its evidence saying what it was picked over."""
    from adapterhub.packaging.evidence import OtherTarget

    best = min(found, key=lambda onto: found[onto].figures.candidate_nll)
    other = next(onto for onto in found if onto != best)
    figures = found[other].figures
    beside: OtherTarget = OtherTarget(
        onto="original" if other == "original" else "trained",
        candidate_nll=figures.candidate_nll,
        kl_mean=figures.kl_mean,
    )
    return best, found[best].model_copy(update={"instead_of": beside})
