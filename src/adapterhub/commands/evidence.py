"""eval."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.targets import base_mismatch_option, refuse_cached
from adapterhub.errors import ManifestError, ReleaseError

if TYPE_CHECKING:
    from adapterhub.cards.evaluation import Evaluation
    from adapterhub.cards.questions import Question
    from adapterhub.packaging.evidence import FailureCase
    from adapterhub.packaging.manifest import BaseMismatch
    from adapterhub.packaging.release import Release
    from adapterhub.trainer.data import Row


@click.command("eval")
@click.argument("release", type=click.Path(path_type=Path))
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="Held-out rows, like test.jsonl."
)
@click.option(
    "--base", type=click.Path(path_type=Path), help="The base's folder. Default: the one it was trained on."
)
@click.option("--endpoint", metavar="URL", help="The Hub to take the base from, instead of $HF_ENDPOINT.")
@base_mismatch_option
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first so many rows.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Questions at once."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Tokens an answer may take. Default: the longest reference and a margin.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def eval_command(
    release: Path,
    data: Path,
    base: Path | None,
    endpoint: str | None,
    allow_base_mismatch: str | None,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int | None,
    as_json: bool,
) -> None:
    """Measure the base beside the adapter of the folder RELEASE on the same rows.

    Both answer each row greedily (exact match with its last assistant message) and are scored by their
    held-out loss. Scores and failure cases are written into the release, under evidence/.
    """
    from adapterhub.cards.failures import keep_added, to_jsonl
    from adapterhub.load import load_release
    from adapterhub.packaging.evidence import FAILURES, SCORES, to_json
    from adapterhub.packaging.release import Release
    from adapterhub.trainer.data import read_rows

    refuse_cached(release)
    opened = Release.open(release)
    refuse_what_cannot_be_measured(opened)
    opened.check_files()  # a score belongs to the very weights that the manifest lists
    rows = read_rows(data, "test")[:limit]
    _refuse_training_rows(opened, data, rows)
    known = _known_cases(opened)
    mismatches: list[BaseMismatch] = []
    model, tokenizer = load_release(
        opened, base, endpoint=endpoint, allow_base_mismatch=allow_base_mismatch, note=mismatches.append
    )
    evaluation = _evaluate(opened, model, tokenizer, known, data, rows, limit, batch_size, max_new_tokens)
    scores = evaluation.scores.model_copy(update={"base_mismatch": next(iter(mismatches), None)})
    evaluation = replace(evaluation, scores=scores, failures=keep_added(evaluation.failures, known))
    opened.with_files({SCORES: to_json(evaluation.scores), FAILURES: to_jsonl(evaluation.failures)})
    click.echo(_as_json(opened, evaluation) if as_json else _as_table(evaluation))


def _refuse_training_rows(release: Release, data: Path, rows: list[Row]) -> None:
    """Raise DataError when ``rows`` are the very rows that the release was trained on."""
    from adapterhub.errors import DataError
    from adapterhub.trainer.data import rows_digest

    digest = rows_digest(rows)
    if any(lock.split == "train" and lock.sha256 == digest for lock in release.manifest.datasets):
        raise DataError(
            f"{data} holds the rows that the adapter was trained on; they say nothing of others",
            "name held-out rows",
        )


def _evaluate(
    release: Release,
    model: Any,
    tokenizer: Any,
    known: tuple[FailureCase, ...],
    data: Path,
    rows: list[Row],
    limit: int | None,
    batch_size: int,
    max_new_tokens: int | None,
) -> Evaluation:
    """Pose the rows, ask both sides."""
    from adapterhub.cards.card import ADAPTER_WEIGHTS
    from adapterhub.cards.evaluation import Subject, evaluate
    from adapterhub.cards.generation import Decoding
    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.cards.questions import answer_budget
    from adapterhub.packaging.manifest import DatasetLock
    from adapterhub.trainer.data import rows_digest
    from adapterhub.trainer.hardware import detect_hardware

    context = getattr(model.config, "max_position_embeddings", None)
    rows, questions, left_out = _pose(tokenizer, rows, context)
    decoding = Decoding(
        max_new_tokens=max_new_tokens or answer_budget(questions),
        batch_size=batch_size,
        end_tokens=end_tokens(tokenizer, model),
        context=context,
    )
    subject = Subject(
        adapter_sha256=release.manifest.files[ADAPTER_WEIGHTS].sha256,
        version=release.manifest.version,
        data=DatasetLock(source=data.name, split="test", rows=len(rows), sha256=rows_digest(rows)),
        limit=limit,
        left_out=left_out,
        tools=_tools(),
        hardware=detect_hardware(),
    )
    since = {case.id: case.since for case in known}
    with progress_on_stderr() as report:
        return evaluate(model, tokenizer, questions, decoding, subject, since=since, report=report)


def refuse_what_cannot_be_measured(release: Release) -> None:
    """Before the long work, say what would only show after it."""
    if release.manifest.kind != "adapter":
        raise ReleaseError(
            f"{release.path} is a {release.manifest.kind} release; base beside adapter needs an adapter",
            "name the adapter release that it was made from",
        )
    if release.is_signed:
        raise ReleaseError(
            f"{release.path} is signed, and evidence would change what the signature covers",
            "remove model.sig, measure, and sign again",
        )


def _pose(tokenizer: Any, rows: list[Row], context: int | None) -> tuple[list[Row], list[Question], int]:
    """Rows as questions; those that do not fit the context are left out, counted and said."""
    from adapterhub.cards.questions import pose
    from adapterhub.errors import DataError
    from adapterhub.trainer.template import encode

    kept: list[tuple[Row, Question]] = []
    too_long: list[str] = []
    for row in rows:
        try:
            encoded = encode(tokenizer, row.messages)
        except DataError as err:
            raise DataError(f"{row.where}: {err.what}", err.fix) from err
        question = pose(
            tokenizer, row.messages, row.where, input_ids=encoded.input_ids, labels=encoded.labels
        )
        if question.fits(context):
            kept.append((row, question))
        else:
            too_long.append(row.where)
    if too_long:
        words = (
            f"left out {len(too_long)} of {len(rows)} rows that do not fit the context of {context} tokens"
        )
        click.echo(f"{words}, like {too_long[0]}", err=True)
    if not kept:
        raise DataError(
            f"none of the {len(rows)} rows fits the context of {context} tokens", "shorten the rows"
        )
    return [row for row, _ in kept], [question for _, question in kept], len(too_long)


def end_tokens(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """What ends an answer: the template's end token, then the tokenizer's and the base's own."""
    from adapterhub.trainer.template import end_token_id

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    configured = inner.generation_config.eos_token_id
    others = configured if isinstance(configured, list) else [configured]
    found = [end_token_id(tokenizer), tokenizer.eos_token_id, *others]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    names = ("adapterhub", "bitsandbytes", "peft", "tokenizers", "torch", "transformers")
    return {name: version(name) for name in names}


def _known_cases(release: Release) -> tuple[FailureCase, ...]:
    """The cases recorded before."""
    from adapterhub.packaging.evidence import read_failures

    try:
        return read_failures(release.path) or ()
    except ManifestError as err:
        click.echo(f"{err.what}; it is replaced", err=True)
        return ()


def _as_json(release: Release, evaluation: Evaluation) -> str:
    from adapterhub.cards.failures import count_classes
    from adapterhub.packaging.evidence import FAILURES, SCORES

    document = {
        "release": str(release.path),
        **evaluation.scores.model_dump(mode="json"),
        "failures": {"cases": len(evaluation.failures), "classes": count_classes(evaluation.failures)},
        "files": [SCORES, FAILURES],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def _as_table(evaluation: Evaluation) -> str:
    """Metric, rows, base and adapter with their intervals, in aligned columns; then the failures."""
    from adapterhub.cards.failures import count_classes
    from adapterhub.cards.formats import METRICS, interval_of, value_of

    lines = [("metric", "rows", "base", "95 % interval", "adapter", "95 % interval")]
    for score in evaluation.scores.scores:
        base = (value_of(score, score.base), interval_of(score, score.base_interval))
        adapter = (value_of(score, score.adapter), interval_of(score, score.adapter_interval))
        lines.append((METRICS[score.metric], str(score.rows), *base, *adapter))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    table = [
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    classes = ", ".join(f"{name} {count}" for name, count in count_classes(evaluation.failures).items())
    table.append(f"failure cases: {len(evaluation.failures)}" + (f" ({classes})" if classes else ""))
    return "\n".join(table)
