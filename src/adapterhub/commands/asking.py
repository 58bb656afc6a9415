"""Rows and probes asked of a loaded release, and of its base before quantization."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.measuring import (
    Base,
    Loaded,
    context_of,
    end_tokens,
    measure_contamination,
    pose_rows,
    tools,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterhub.cards.benchmarks import Asked
    from adapterhub.cards.contamination import Messages
    from adapterhub.cards.evaluation import Evaluation, Measured
    from adapterhub.cards.probes import Suite
    from adapterhub.cards.probing import Subject
    from adapterhub.packaging.evidence import FailureCase
    from adapterhub.packaging.precisions import PrecisionsEvidence
    from adapterhub.packaging.probes import ProbesEvidence
    from adapterhub.packaging.release import Release
    from adapterhub.packaging.tasks import TasksEvidence
    from adapterhub.trainer.data import Row


@dataclass(frozen=True)
class Rows:
    """Held-out rows, and how they are to be answered."""

    source: Path
    rows: list[Row]
    limit: int | None
    max_new_tokens: int | None
    """None: the longest reference and a margin."""
    batch_size: int
    train: tuple[Path, list[Row]] | None
    """The rows that were trained on, if they are here."""


@dataclass(frozen=True)
class Unquantized:
    """What the base says in 16 bits."""

    measured: Measured
    seconds: float


def measure_rows(loaded: Loaded, wanted: Rows, known: Sequence[FailureCase]) -> Evaluation:
    """Base and adapter on the rows, with their failure cases; ``known`` are those recorded before."""
    from adapterhub.cards.evaluation import Subject, evaluate
    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.cards.questions import answer_budget
    from adapterhub.packaging.manifest import DatasetLock
    from adapterhub.trainer.data import rows_digest
    from adapterhub.trainer.hardware import detect_hardware

    rows, questions, left_out = pose_rows(loaded.tokenizer, wanted.rows, loaded.context)
    decoding = loaded.decoding(wanted.batch_size, wanted.max_new_tokens or answer_budget(questions))
    subject = Subject(
        adapter_sha256=loaded.adapter_sha256,
        version=loaded.release.manifest.version,
        data=DatasetLock(source=wanted.source.name, split="test", rows=len(rows), sha256=rows_digest(rows)),
        limit=wanted.limit,
        left_out=left_out,
        tools=tools(),
        hardware=detect_hardware(),
        contamination=measure_contamination(loaded.release, rows, wanted.train),
        base_mismatch=loaded.base_mismatch,
    )
    since = {case.id: case.since for case in known}
    with progress_on_stderr() as report:
        return evaluate(
            loaded.model, loaded.tokenizer, questions, decoding, subject, since=since, report=report
        )


def measure_unquantized(release: Release, wanted: Rows, base: Base) -> Unquantized:
    """The base in 16 bits on the rows, loaded and let go before anything else takes memory."""
    from adapterhub.cards.evaluation import measure
    from adapterhub.cards.generation import Decoding
    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.cards.questions import answer_budget
    from adapterhub.load import default_device, find_base
    from adapterhub.trainer.model import load_base, load_tokenizer

    tokenizer = load_tokenizer(release.path)
    folder = find_base(
        release.manifest.base, base.named, endpoint=base.endpoint, allow_mismatch=base.allow_mismatch
    )
    model: Any = load_base(folder, None, default_device())
    model.eval()
    context = context_of(model)
    _, questions, _ = pose_rows(tokenizer, wanted.rows, context, quiet=True)
    budget = wanted.max_new_tokens or answer_budget(questions)
    decoding = Decoding(budget, wanted.batch_size, end_tokens(tokenizer, model), context)
    began = time.perf_counter()
    with progress_on_stderr() as report:
        measured = measure(model, tokenizer, questions, decoding, "base in 16 bits", report)
    return Unquantized(measured, time.perf_counter() - began)


def compare_with_unquantized(
    loaded: Loaded, wanted: Rows, evaluation: Evaluation, sixteen: Unquantized
) -> PrecisionsEvidence:
    """Three sides on the same rows as evidence."""
    from adapterhub.cards.formats import quantization_in_full
    from adapterhub.cards.precisions import compare_precisions

    manifest = loaded.release.manifest
    return compare_precisions(
        pose_rows(loaded.tokenizer, wanted.rows, loaded.context, quiet=True)[1],
        sixteen.measured,
        evaluation.base,
        evaluation.adapter,
        scores=evaluation.scores,
        quantization=quantization_in_full(manifest.base.quantization if manifest.base else None),
        seconds=round(sixteen.seconds + evaluation.scores.seconds, 1),
    )


def measure_probes(loaded: Loaded, suites: Sequence[Suite], batch_size: int) -> ProbesEvidence:
    """Base and adapter on the probes; those that cannot be asked are counted and said."""
    from adapterhub.cards.probing import pose_probes, probe_both
    from adapterhub.cards.progress import progress_on_stderr

    posed = pose_probes(loaded.tokenizer, suites, loaded.context)
    if posed.left_out:
        words = f"left out {len(posed.left_out)} of {len(posed.left_out) + len(posed.probes)} probes"
        click.echo(f"{words}, like this one: {posed.left_out[0]}", err=True)
    decoding = loaded.decoding(batch_size, max(probe.max_new_tokens for probe in posed.probes))
    with progress_on_stderr() as report:
        return probe_both(loaded.model, loaded.tokenizer, posed, decoding, _subject(loaded), report)


def probe_failures(
    loaded: Loaded, probes: ProbesEvidence, known: Sequence[FailureCase]
) -> tuple[FailureCase, ...]:
    """What the adapter fails among the probes; ``known`` cases keep the version that first failed them."""
    from adapterhub.cards.probing import find_probe_failures

    since = {case.id: case.since for case in known}
    return find_probe_failures(probes, version=loaded.release.manifest.version, since=since)


def run_tasks(loaded: Loaded, asked: Asked, trained: list[Messages] | None) -> TasksEvidence:
    """Benchmarks on base and adapter; see ``cards.benchmarks.run_tasks``."""
    from adapterhub.cards import benchmarks

    return benchmarks.run_tasks(loaded.model, loaded.tokenizer, asked, _subject(loaded), trained)


def _subject(loaded: Loaded) -> Subject:
    """What probes and benchmarks say of what they measured."""
    from adapterhub.cards.probing import Subject
    from adapterhub.trainer.hardware import detect_hardware

    return Subject(loaded.adapter_sha256, tools(), detect_hardware(), loaded.base_mismatch)
