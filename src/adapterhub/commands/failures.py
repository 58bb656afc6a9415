"""failures list, failures run; failures add and mine are in commands.recording."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands import measuring
from adapterhub.commands.recording import (
    BASE_HELP,
    add_command,
    mine_command,
    read_draws,
    sampling_options,
)
from adapterhub.commands.targets import base_mismatch_option
from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterhub.cards.replay import Draws, Replayed
    from adapterhub.packaging.evidence import FailureCase, FailureRate
    from adapterhub.packaging.manifest import BaseMismatch
    from adapterhub.packaging.release import Release

_SHOWN_CHARS = 72


@click.group("failures")
def failures_command() -> None:
    """Known failure cases of a release: list them, run them again, add one, search for more."""


failures_command.add_command(add_command)
failures_command.add_command(mine_command)


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
    width = max((len(case.failure_class) for case in cases), default=0)
    for case in cases:
        click.echo(f"{case.id}  {case.failure_class:<{width}}  since {case.since}  {_asked(case)}")
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
@sampling_options
@click.option("--base", type=click.Path(path_type=Path), help=BASE_HELP)
@base_mismatch_option
@click.option("--endpoint", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def run_command(
    ref: str,
    cases: str | None,
    side: str,
    samples: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    base: Path | None,
    allow_base_mismatch: str | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Ask the recorded failure cases again, of REF: a release's folder, or owner/name[@version].

    Each is answered as it was recorded and held to its check: still failing, fixed, or flaky (right in some
    answers). Greedily that is once in batches of the recorded size and once alone; with sampling as often as
    recorded, from the same seed, and the rate of failures is told with its 95 % interval. --samples draws
    for every case. With --cases, the cases of that file or release are asked too, and what REF alone records
    and fails is new. A folder of a plain base model answers others' --cases. Writes nothing.
    """
    from adapterhub.cards.replay import join_cases
    from adapterhub.load import open_release

    draws = read_draws(samples, temperature, top_p, seed)
    if _is_plain_base(Path(ref)):
        _run_on_base(Path(ref), cases, endpoint, draws, as_json)
        return
    release = open_release(ref, endpoint=endpoint)
    if side == "base" and release.manifest.kind != "adapter":
        raise ReleaseError(
            f"{release.path} is a {release.manifest.kind} release: its base is not inside it",
            "name an adapter release, or leave --side out",
        )
    earlier = None if cases is None else _cases_of(cases, endpoint)
    own = _recorded(release) if earlier is None else _own_cases(release)
    wanted = join_cases(own, earlier or ())
    replayed, mismatch = [], None
    if wanted:
        loaded = measuring.load(release, measuring.Base(base, endpoint, allow_base_mismatch))
        mismatch = loaded.base_mismatch
        with loaded.model.disable_adapter() if side == "base" else nullcontext():
            replayed = _ask_again(loaded.model, loaded.tokenizer, wanted, earlier, draws)
    who = {"release": str(release.path), "version": release.manifest.version, "side": side}
    click.echo(_as_json(who, replayed, mismatch) if as_json else _as_text(replayed))


def _is_plain_base(folder: Path) -> bool:
    """Whether ``folder`` holds a model that is no release."""
    from adapterhub.packaging.manifest import MANIFEST_NAME

    return (folder / "config.json").is_file() and not (folder / MANIFEST_NAME).exists()


def _run_on_base(
    folder: Path, cases: str | None, endpoint: str | None, draws: Draws | None, as_json: bool
) -> None:
    """A base model's folder, in 16 bits, asked the cases of somebody else."""
    from adapterhub.load import default_device
    from adapterhub.trainer.model import load_base, load_tokenizer

    if cases is None:
        raise ReleaseError(f"{folder} is a model and no release: it records no cases", "name --cases")
    earlier = _cases_of(cases, endpoint)
    replayed = []
    if earlier:
        model = load_base(folder, None, default_device())
        replayed = _ask_again(model, load_tokenizer(folder), earlier, earlier, draws)
    who = {"release": str(folder), "version": None, "side": "base"}
    click.echo(_as_json(who, replayed, None) if as_json else _as_text(replayed))


def _recorded(release: Release) -> tuple[FailureCase, ...]:
    """The release's cases; it must have been measured."""
    from adapterhub.packaging.evidence import read_failures

    cases = read_failures(release.path)
    if cases is None:
        raise ReleaseError(
            f"{release.path} records no failure cases: it was not measured",
            "measure it with `adapterhub eval`; `failures run` can ask another's --cases",
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


def _ask_again(
    model: Any,
    tokenizer: Any,
    cases: Sequence[FailureCase],
    earlier: Sequence[FailureCase] | None,
    draws: Draws | None,
) -> list[Replayed]:
    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.cards.replay import replay

    with progress_on_stderr("cases") as report:
        return replay(
            model,
            tokenizer,
            cases,
            earlier,
            end_tokens=measuring.end_tokens(tokenizer, model),
            context=measuring.context_of(model),
            report=report,
            draws=draws,
        )


def _as_json(who: dict[str, Any], replayed: list[Replayed], mismatch: BaseMismatch | None) -> str:
    document = {
        **who,
        "base_mismatch": mismatch and mismatch.model_dump(mode="json"),
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
                "rate": result.rate and result.rate.model_dump(mode="json"),
            }
            for result in replayed
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def _as_text(replayed: list[Replayed]) -> str:
    lines = [
        f"{result.case.id}  {result.status:<13}  {_rate(result.rate)}{_asked(result.case)}"
        for result in replayed
    ]
    lines.append(", ".join(f"{name}: {count}" for name, count in _counts(replayed).items()))
    return "\n".join(lines)


def _rate(rate: FailureRate | None) -> str:
    """``fails 3 of 10 (10.8 to 60.3 %)  ``; nothing for a greedy answer."""
    from adapterhub.cards.formats import in_percent_interval

    if rate is None:
        return ""
    return f"fails {rate.failed} of {rate.samples} ({in_percent_interval(rate.interval)})  "


def _counts(replayed: list[Replayed]) -> dict[str, int]:
    from adapterhub.cards.replay import STATUSES

    counts = Counter(result.status for result in replayed)
    return {status: counts[status] for status in STATUSES}


def _asked(case: FailureCase) -> str:
    """The last message, on one short line."""
    from adapterhub.cards.escaping import one_line

    text = one_line(case.messages[-1]["content"]) if case.messages else ""
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"
