"""eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.commands import asking, figures, measuring
from adapterhub.commands.listing import ListingCommand
from adapterhub.commands.targets import base_mismatch_option
from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    from adapterhub.cards.benchmarks import Asked
    from adapterhub.cards.contamination import Messages
    from adapterhub.cards.probes import Suite
    from adapterhub.packaging.release import Release
    from adapterhub.trainer.data import Row


@dataclass(frozen=True)
class _Wanted:
    """What one run of eval is to measure, read and checked before a model is loaded."""

    rows: asking.Rows | None
    precisions: bool
    suites: list[Suite]
    asked: Asked | None
    trained: list[Messages] | None
    """What was trained on; None: not here."""
    batch_size: int


@click.command("eval", cls=ListingCommand)
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Held-out rows, like test.jsonl.")
@click.option(
    "--precisions",
    is_flag=True,
    help="With --data: the base in 16 bits too, for what quantization cost and training bought back.",
)
@click.option(
    "--probes",
    metavar="all|CLASS…|FILE…",
    multiple=True,
    help="Ask probes: all built-in ones, a class of them, or a file of your own; several in a row.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="What the built-in probes are generated from.",
)
@click.option(
    "--tasks",
    metavar="TASK…",
    multiple=True,
    help="Run benchmarks of lm-eval, or task files (.yaml); several in a row.",
)
@click.option(
    "--few-shot", type=click.IntRange(min=0), help="Examples before a question. Default: the task's."
)
@click.option("--chat-template", is_flag=True, help="Put the tasks' questions through the chat template.")
@click.option(
    "--train",
    "train_data",
    type=click.Path(path_type=Path),
    help="Training rows to look for in what is asked. Default: the recipe's, if they are here.",
)
@click.option(
    "--base", type=click.Path(path_type=Path), help="The base's folder. Default: the one it was trained on."
)
@click.option("--endpoint", metavar="URL", help="The Hub to take the base from, instead of $HF_ENDPOINT.")
@base_mismatch_option
@click.option(
    "--limit", type=click.IntRange(min=1), help="Take only the first so many rows, and of each task."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Questions at once."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Tokens an answer to a row may take. Default: the longest reference and a margin.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def eval_command(
    release: Path,
    data: Path | None,
    precisions: bool,
    probes: tuple[str, ...],
    seed: int,
    tasks: tuple[str, ...],
    few_shot: int | None,
    chat_template: bool,
    train_data: Path | None,
    base: Path | None,
    endpoint: str | None,
    allow_base_mismatch: str | None,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int | None,
    as_json: bool,
) -> None:
    """Measure the base beside the adapter of the folder RELEASE on the same rows, probes or benchmarks.

    Rows are answered greedily (exact match with their last assistant message) and scored by their held-out
    loss. Probes are held to their checks, class by class. What is measured, and the failure cases that it
    shows, are written into the release, under evidence/.
    """
    if data is None and not probes and not tasks:
        raise click.UsageError("say what to measure: --data FILE, --probes all or --tasks TASK")
    if precisions and data is None:
        raise click.UsageError("--precisions needs rows: --data FILE")
    opened = measuring.open_measurable(release, _evidence_made(data, precisions, probes, tasks))
    if precisions and opened.manifest.base and opened.manifest.base.quantization is None:
        raise ReleaseError(f"the base of {release} is not quantized", "leave --precisions out")
    suites = find_suites(probes, seed)
    asked = _read_tasks(tasks, limit, few_shot, batch_size, chat_template)
    train = measuring.read_training_rows(opened, train_data) if data or asked else None
    wanted = _Wanted(
        rows=_read_rows(opened, data, limit, max_new_tokens, batch_size, train) if data else None,
        precisions=precisions,
        suites=suites,
        asked=asked,
        trained=[row.messages for row in train[1]] if train else None,
        batch_size=batch_size,
    )
    measurement = _measure(opened, wanted, measuring.Base(base, endpoint, allow_base_mismatch))
    click.echo(figures.as_json(opened, measurement) if as_json else figures.as_text(measurement))


def _evidence_made(
    data: Path | None, precisions: bool, probes: tuple[str, ...], tasks: tuple[str, ...]
) -> list[str]:
    """The files that a measurement writes from nothing else than what it measures."""
    from adapterhub.packaging.evidence import SCORES
    from adapterhub.packaging.precisions import PRECISIONS
    from adapterhub.packaging.probes import PROBES
    from adapterhub.packaging.tasks import TASKS

    made = {SCORES: data, PRECISIONS: precisions, PROBES: probes, TASKS: tasks}
    return [name for name, is_asked in made.items() if is_asked]


def find_suites(names: tuple[str, ...], seed: int) -> list[Suite]:
    """The suites that ``--probes`` names."""
    from adapterhub.cards import probes

    return probes.find_suites(_split(names), seed) if names else []


def _read_rows(
    release: Release,
    data: Path,
    limit: int | None,
    max_new_tokens: int | None,
    batch_size: int,
    train: tuple[Path, list[Row]] | None,
) -> asking.Rows:
    from adapterhub.trainer.data import read_rows

    rows = read_rows(data, "test")[:limit]
    measuring.refuse_training_rows(release, data, rows)
    return asking.Rows(data, rows, limit, max_new_tokens, batch_size, train)


def _read_tasks(
    tasks: tuple[str, ...], limit: int | None, few_shot: int | None, batch_size: int, chat_template: bool
) -> Asked | None:
    from adapterhub.cards.benchmarks import Asked, check_tasks

    names = _split(tasks)
    if not names:
        return None
    check_tasks(names)
    return Asked(tuple(names), limit, few_shot, batch_size, chat_template)


def _split(values: tuple[str, ...]) -> list[str]:
    """Names of an option that may be repeated and hold several with commas between."""
    return list(dict.fromkeys(part.strip() for value in values for part in value.split(",") if part.strip()))


def _measure(release: Release, wanted: _Wanted, base: measuring.Base) -> figures.Measurement:
    """Measure what is wanted; each part is in the release as soon as it is there."""
    from adapterhub.cards.failures import keep_others, to_jsonl
    from adapterhub.packaging.evidence import FAILURES, SCORES, to_json
    from adapterhub.packaging.precisions import PRECISIONS
    from adapterhub.packaging.probes import PROBES
    from adapterhub.packaging.tasks import TASKS

    sixteen = None
    if wanted.rows and wanted.precisions:
        sixteen = asking.measure_unquantized(release, wanted.rows, base)
    loaded = measuring.load(release, base)
    known = measuring.known_cases(release)
    result = figures.Measurement(failures=known)
    if wanted.rows:
        evaluation = result.evaluation = asking.measure_rows(loaded, wanted.rows, known)
        result.failures = keep_others(evaluation.failures, known, "rows")
        release = release.with_files(
            {SCORES: to_json(evaluation.scores), FAILURES: to_jsonl(result.failures)}
        )
        if sixteen is not None:
            result.precisions = asking.compare_with_unquantized(loaded, wanted.rows, evaluation, sixteen)
            release = release.with_files({PRECISIONS: to_json(result.precisions)})
    if wanted.suites:
        result.probes = asking.measure_probes(loaded, wanted.suites, wanted.batch_size)
        found = asking.probe_failures(loaded, result.probes, known)
        result.failures = keep_others(found, result.failures, "probes")
        release = release.with_files({PROBES: to_json(result.probes), FAILURES: to_jsonl(result.failures)})
    if wanted.asked is not None:
        result.tasks = asking.run_tasks(loaded, wanted.asked, wanted.trained)
        release.with_files({TASKS: to_json(result.tasks)})
    return result
