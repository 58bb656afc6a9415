"""failures add, failures mine: cases recorded into a release."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands import asking, measuring
from adapterhub.commands.evidence import find_suites
from adapterhub.commands.listing import ListingCommand
from adapterhub.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterhub.cards.generation import Answer
    from adapterhub.cards.replay import Draws
    from adapterhub.packaging.evidence import FailureCase
    from adapterhub.packaging.release import Release

BASE_HELP = "The base's folder. Default: the one it was trained on."
_SAMPLES_AT_ONCE = 16


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how answers are drawn at random."""
    options = (
        click.option(
            "--samples",
            type=click.IntRange(1, 1000),
            help="Draw so many answers instead of the greedy one, and tell how often they fail.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0, 100, min_open=True),
            default=0.7,
            show_default=True,
            help="Of sampling.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.9,
            show_default=True,
            help="Of sampling (the paper's 0.7 and 0.9 are the defaults).",
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Of sampling."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command("add")
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
@sampling_options
@click.option("--base", type=click.Path(path_type=Path), help=BASE_HELP)
def add_command(
    release: Path,
    prompt: str,
    system: str | None,
    expect: str | None,
    check: str | None,
    note: str | None,
    max_new_tokens: int,
    samples: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    base: Path | None,
) -> None:
    """Ask the adapter in the folder RELEASE, and record its answer as a failure case if it fails the check.

    The base's answer is recorded beside it. With --samples, answers are drawn, and the rate that fails is
    recorded with its interval. Answers that all pass are no failure case, and a check that every answer
    passes is refused. `adapterhub eval` keeps the cases that were added.
    """
    from adapterhub.cards.checks import read_check
    from adapterhub.cards.failures import add_case, to_jsonl
    from adapterhub.packaging.evidence import FAILURES, read_failures

    expected = _expected(expect, check)
    read_check(expected, "--check")
    _refuse_broken_text(prompt, system or "", note or "", json.dumps(expected, ensure_ascii=False))
    draws = read_draws(samples, temperature, top_p, seed)
    opened = measuring.open_measurable(release)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    adapter, base_answer, decoding = _ask_both(opened, messages, max_new_tokens, base, draws)
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
    case = cases[-1]
    often = f" (fails {case.rate.failed} of {case.rate.samples})" if case.rate else ""
    click.echo(f"the adapter answers {case.observed!r}{often}, the base {base_answer.text!r}", err=True)
    click.echo(case.id)


@click.command("mine", cls=ListingCommand)
@click.argument("release", type=click.Path(path_type=Path))
@click.option(
    "--probes",
    metavar="all|CLASS…|FILE…",
    multiple=True,
    help="Where to look: see `adapterhub eval`. Default, without --data: all built-in probes.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Rows with the right answer to look among.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first so many rows.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="What the built-in probes are generated from; `eval` asks those of 0.",
)
@click.option(
    "--each", type=click.IntRange(min=1), default=5, show_default=True, help="New cases of a class, at most."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Questions at once."
)
@click.option("--base", type=click.Path(path_type=Path), help=BASE_HELP)
@click.option("--endpoint", metavar="URL", help="The Hub to take the base from, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the new cases as one JSON list.")
def mine_command(
    release: Path,
    probes: tuple[str, ...],
    data: Path | None,
    limit: int | None,
    seed: int,
    each: int,
    batch_size: int,
    base: Path | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Search for failure cases of the adapter in the folder RELEASE, and record the telling ones.

    Probes and rows are answered greedily by adapter and base. Of what the adapter fails, each class keeps a
    few: those that the base gets right first, then those least like what was expected, and none that is
    known or repeats an answer. Measuring again keeps what was mined.
    """
    from adapterhub.cards.failures import to_jsonl
    from adapterhub.cards.mining import choose_cases
    from adapterhub.packaging.evidence import FAILURES
    from adapterhub.trainer.data import read_rows

    opened = measuring.open_measurable(release)
    names = probes or (() if data else ("all",))
    suites = find_suites(names, seed)
    rows = read_rows(data, "test")[:limit] if data else []
    loaded = measuring.load(opened, measuring.Base(base, endpoint))
    known = measuring.known_cases(opened)
    found: list[FailureCase] = []
    if data:
        found += asking.measure_rows(
            loaded, asking.Rows(data, rows, limit, None, batch_size, None), ()
        ).failures
    if suites:
        found += asking.probe_failures(loaded, asking.measure_probes(loaded, suites, batch_size), ())
    chosen = choose_cases(found, known, each)
    opened.with_files({FAILURES: to_jsonl([*known, *chosen])})
    words = "case is" if len(chosen) == 1 else "cases are"
    click.echo(f"{len(found)} of what was asked fails; {len(chosen)} new {words} recorded", err=True)
    if as_json:
        click.echo(
            json.dumps([case.model_dump(mode="json") for case in chosen], indent=2, ensure_ascii=False)
        )
    for case in () if as_json else chosen:
        click.echo(f"{case.id}  {case.failure_class}")


def read_draws(samples: int | None, temperature: float, top_p: float, seed: int) -> Draws | None:
    """What the sampling options say; None: no sampling."""
    from adapterhub.cards.generation import Sampling
    from adapterhub.cards.replay import Draws

    return None if samples is None else Draws(samples, Sampling(temperature, top_p, seed))


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
    release: Release,
    messages: list[dict[str, str]],
    max_new_tokens: int,
    base: Path | None,
    draws: Draws | None,
) -> tuple[list[Answer], Answer, dict[str, Any]]:
    """The adapter's answers, the base's greedy one, and the decoding as the case records it."""
    from adapterhub.cards.evaluation import describe_decoding
    from adapterhub.cards.generation import draw_samples, generate_answers
    from adapterhub.cards.questions import pose_prompt

    loaded = measuring.load(release, measuring.Base(base))
    asked = pose_prompt(loaded.tokenizer, messages, "--prompt")
    if loaded.context is not None and len(asked.prompt_ids) >= loaded.context:
        raise DataError(
            f"--prompt has {len(asked.prompt_ids):,} tokens, and the context is {loaded.context:,}",
            "shorten it",
        )
    greedy = decoding = loaded.decoding(1, max_new_tokens)
    if draws is None:
        adapter = generate_answers(loaded.model, loaded.tokenizer, [asked], decoding, _report_nothing)
    else:
        size = min(draws.samples, _SAMPLES_AT_ONCE)
        decoding = replace(greedy, batch_size=size, sampling=draws.sampling)
        adapter = draw_samples(loaded.model, loaded.tokenizer, asked, draws.samples, decoding)
    with loaded.model.disable_adapter():
        (base_answer,) = generate_answers(loaded.model, loaded.tokenizer, [asked], greedy, _report_nothing)
    return adapter, base_answer, describe_decoding(loaded.tokenizer, decoding)


def _report_nothing(_done: int, _total: int) -> None:
    """One question needs no progress bar."""
