"""failures list, failures run, failures add."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.targets import base_mismatch_option
from adapterhub.errors import DataError, ReleaseError

if TYPE_CHECKING:
    from adapterhub.cards.replay import Replayed
    from adapterhub.packaging.evidence import FailureCase
    from adapterhub.packaging.manifest import BaseMismatch
    from adapterhub.packaging.release import Release

_SHOWN_CHARS = 72
_BASE_HELP = "The base's folder. Default: the one it was trained on."


@click.group("failures")
def failures_command() -> None:
    """Known failure cases of a release: list them, run them again, add one."""


@failures_command.command("list")
@click.argument("ref")
@click.option("--endpoint", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the cases as one JSON list.")
def list_command(ref: str, endpoint: str | None, as_json: bool) -> None:
    """List the failure cases recorded in REF: a release's folder, or owner/name[@version]."""
    from adapterhub.cards.failures import count_classes
    from adapterhub.load import open_release

    cases = _recorded(open_release(ref, endpoint=endpoint))
    if as_json:
        click.echo(json.dumps([case.model_dump(mode="json") for case in cases], indent=2, ensure_ascii=False))
        return
    for case in cases:
        click.echo(f"{case.id}  {case.failure_class:<13}  since {case.since}  {_asked(case)}")
    classes = ", ".join(f"{name} {count}" for name, count in count_classes(cases).items())
    click.echo(f"failure cases: {len(cases)}" + (f" ({classes})" if classes else ""), err=True)


@failures_command.command("run")
@click.argument("ref")
@click.option(
    "--cases",
    metavar="FILE|REF",
    help="Cases to compare with: a failures.jsonl, or another release, like the version before.",
)
@click.option(
    "--side",
    type=click.Choice(["adapter", "base"]),
    default="adapter",
    show_default=True,
    help="Who answers.",
)
@click.option("--base", type=click.Path(path_type=Path), help=_BASE_HELP)
@base_mismatch_option
@click.option("--endpoint", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def run_command(
    ref: str,
    cases: str | None,
    side: str,
    base: Path | None,
    allow_base_mismatch: str | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Ask the recorded failure cases again, of REF: a release's folder, or owner/name[@version].

    Each is answered greedily, once in batches of the recorded size and once alone, and held to its check:
    still failing, fixed, or flaky (right or wrong by what is asked beside it). With --cases, the cases of
    that file or release are asked too, and what REF alone records and fails is new. Writes nothing.
    """
    from adapterhub.cards.replay import join_cases
    from adapterhub.load import load_release, open_release

    release = open_release(ref, endpoint=endpoint)
    if side == "base" and release.manifest.kind != "adapter":
        raise ReleaseError(
            f"{release.path} is a {release.manifest.kind} release: its base is not inside it",
            "name an adapter release, or leave --side out",
        )
    earlier = None if cases is None else _cases_of(cases, endpoint)
    own = _recorded(release) if earlier is None else _own_cases(release)
    mismatches: list[BaseMismatch] = []
    load = partial(
        load_release,
        release,
        base,
        endpoint=endpoint,
        allow_base_mismatch=allow_base_mismatch,
        note=mismatches.append,
    )
    replayed = _replay(load, join_cases(own, earlier or ()), earlier, side)
    click.echo(_as_json(release, side, replayed, mismatches) if as_json else _as_text(replayed))


@failures_command.command("add")
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What the user says.")
@click.option("--system", help="A system message before it.")
@click.option("--expect", help="The whole answer that would be right.")
@click.option("--check", help='A check as JSON, like \'{"type": "contains_any", "answers": ["4"]}\'.')
@click.option("--note", help="What is to be said of it.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1, 32_768),
    default=256,
    show_default=True,
    help="Tokens it may take.",
)
@click.option("--base", type=click.Path(path_type=Path), help=_BASE_HELP)
def add_command(
    release: Path,
    prompt: str,
    system: str | None,
    expect: str | None,
    check: str | None,
    note: str | None,
    max_new_tokens: int,
    base: Path | None,
) -> None:
    """Ask the adapter in the folder RELEASE, and record its answer as a failure case if it fails the check.

    The base's answer is recorded beside it. An answer that passes is no failure case, and a check that
    every answer passes is refused. `adapterhub eval` keeps the cases that were added.
    """
    from adapterhub.cards.checks import read_check
    from adapterhub.cards.failures import add_case, to_jsonl
    from adapterhub.commands.evidence import refuse_what_cannot_be_measured
    from adapterhub.commands.targets import refuse_cached
    from adapterhub.packaging.evidence import FAILURES, read_failures
    from adapterhub.packaging.release import Release

    expected = _expected(expect, check)
    read_check(expected, "--check")
    _refuse_broken_text(prompt, system or "", note or "", json.dumps(expected, ensure_ascii=False))
    refuse_cached(release)
    opened = Release.open(release)
    refuse_what_cannot_be_measured(opened)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    adapter, base_answer, decoding = _ask_both(opened, messages, max_new_tokens, base)
    cases = add_case(
        read_failures(release) or (),
        messages,
        expected,
        adapter=adapter,
        base=base_answer,
        decoding=decoding,
        version=opened.manifest.version,
        note=note,
    )
    opened.with_files({FAILURES: to_jsonl(cases)})
    click.echo(f"the adapter answers {adapter.text!r}, the base {base_answer.text!r}", err=True)
    click.echo(cases[-1].id)


def _recorded(release: Release) -> tuple[FailureCase, ...]:
    """The release's cases; it must have been measured."""
    from adapterhub.packaging.evidence import read_failures

    cases = read_failures(release.path)
    if cases is None:
        raise ReleaseError(
            f"{release.path} records no failure cases: it was not measured",
            "measure it with `adapterhub eval`, or name the --cases of another release",
        )
    return cases


def _own_cases(release: Release) -> tuple[FailureCase, ...]:
    """The release's cases; none when it was not measured, and others' are asked."""
    from adapterhub.packaging.evidence import read_failures

    return read_failures(release.path) or ()


def _cases_of(source: str, endpoint: str | None) -> tuple[FailureCase, ...]:
    """The cases of a JSONL file, or of another release."""
    from adapterhub.load import open_release
    from adapterhub.packaging.evidence import read_cases

    if Path(source).is_file():
        return read_cases(Path(source))
    return _recorded(open_release(source, endpoint=endpoint))


def _replay(
    load: Callable[[], tuple[Any, Any]],
    cases: list[FailureCase],
    earlier: tuple[FailureCase, ...] | None,
    side: str,
) -> list[Replayed]:
    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.cards.replay import replay
    from adapterhub.commands.evidence import end_tokens

    if not cases:
        return []
    model, tokenizer = load()
    switched = model.disable_adapter() if side == "base" else nullcontext()
    with switched, progress_on_stderr() as report:
        return replay(
            model,
            tokenizer,
            cases,
            earlier,
            end_tokens=end_tokens(tokenizer, model),
            context=getattr(model.config, "max_position_embeddings", None),
            report=report,
        )


def _expected(expect: str | None, check: str | None) -> dict[str, Any]:
    """The check that a case is held to, from the one option of two that says it."""
    if (expect is None) == (check is None):
        raise click.UsageError("say what is right with --expect TEXT or with --check JSON")
    if check is None:
        return {"type": "exact", "value": expect}
    try:
        content = json.loads(check)
    except (ValueError, RecursionError) as err:
        raise DataError("--check is not JSON", "docs/evidence.md lists the checks") from err
    if not isinstance(content, dict):
        raise DataError("--check is no JSON object", "docs/evidence.md lists the checks")
    return content


def _refuse_broken_text(*texts: str) -> None:
    """Bytes that are not UTF-8 arrive as half a surrogate pair, which no evidence file can hold."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise DataError(f"{text!r} is not UTF-8 text", "write it in UTF-8") from err


def _ask_both(
    release: Release, messages: list[dict[str, str]], max_new_tokens: int, base: Path | None
) -> tuple[Any, Any, dict[str, Any]]:
    """The adapter's answer, the base's, and the decoding as the case records it."""
    from adapterhub.cards.evaluation import describe_decoding
    from adapterhub.cards.generation import Decoding, generate_answers
    from adapterhub.cards.questions import pose_prompt
    from adapterhub.commands.evidence import end_tokens
    from adapterhub.load import load_release

    loaded, tokenizer = load_release(release, base)
    model: Any = loaded
    context = getattr(model.config, "max_position_embeddings", None)
    asked = pose_prompt(tokenizer, messages, "--prompt")
    if context is not None and len(asked.prompt_ids) >= context:
        raise DataError(
            f"--prompt has {len(asked.prompt_ids):,} tokens, and the context is {context:,}", "shorten it"
        )
    decoding = Decoding(max_new_tokens, 1, end_tokens(tokenizer, model), context)
    (adapter,) = generate_answers(model, tokenizer, [asked], decoding, _report_nothing)
    with model.disable_adapter():
        (base_answer,) = generate_answers(model, tokenizer, [asked], decoding, _report_nothing)
    return adapter, base_answer, describe_decoding(tokenizer, decoding)


def _report_nothing(_done: int, _total: int) -> None:
    """One question needs no progress bar."""


def _as_json(release: Release, side: str, replayed: list[Replayed], mismatches: list[BaseMismatch]) -> str:
    document = {
        "release": str(release.path),
        "version": release.manifest.version,
        "side": side,
        "base_mismatch": mismatches[0].model_dump(mode="json") if mismatches else None,
        "counts": _counts(replayed),
        "cases": [
            {
                "id": result.case.id,
                "status": result.status,
                "failure_class": result.case.failure_class,
                "since": result.case.since,
                "expected": result.case.expected,
                "observed": result.case.observed,
                "answer": result.answer,
                "answer_alone": result.answer_alone,
            }
            for result in replayed
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def _as_text(replayed: list[Replayed]) -> str:
    lines = [f"{result.case.id}  {result.status:<13}  {_asked(result.case)}" for result in replayed]
    lines.append(", ".join(f"{name}: {count}" for name, count in _counts(replayed).items()))
    return "\n".join(lines)


def _counts(replayed: list[Replayed]) -> dict[str, int]:
    from adapterhub.cards.replay import STATUSES

    counts = Counter(result.status for result in replayed)
    return {status: counts[status] for status in STATUSES}


def _asked(case: FailureCase) -> str:
    """The last message, on one short line."""
    from adapterhub.cards.escaping import one_line

    text = one_line(case.messages[-1]["content"]) if case.messages else ""
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"
