"""arena judge, arena people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.server import serve_extra
from adapterhub.errors import DataError

if TYPE_CHECKING:
    from adapterhub.cards.ballot import Ballot
    from adapterhub.cards.contest import Contest
    from adapterhub.cards.judging import Judge, Round
    from adapterhub.commands.contestants import Setting

_ANSWER_TOKENS = 512
_JUDGE_TOKENS = 1024
Command = Callable[..., None]


def _contest_options(command: Command) -> Command:
    """The arguments and options that both commands have."""
    whole_number = click.IntRange(min=1)
    file_or_folder = click.Path(path_type=Path)
    tokens, arena = _ANSWER_TOKENS, Path("arena")
    for decorate in (
        click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT."),
        click.option("--base", metavar="DIR|REF", help="An adapter's base. Default: the one it names."),
        click.option(
            "--batch-size", type=whole_number, default=8, show_default=True, help="Questions at once."
        ),
        click.option(
            "--max-new-tokens", type=whole_number, default=tokens, show_default=True, help="Of an answer."
        ),
        click.option(
            "--out",
            type=file_or_folder,
            default=arena,
            show_default=True,
            help="The arena: new, or gone on with.",
        ),
        click.option(
            "--questions",
            type=file_or_folder,
            help="JSONL: question_id; messages, or text. Default: those of the arena that is gone on with.",
        ),
        click.argument("b", metavar="B"),
        click.argument("a", metavar="A"),
    ):
        command = decorate(command)
    return command


@click.command("judge")
@_contest_options
@click.option("--judge", required=True, metavar="URL|DIR", help="An OpenAI-compatible API, or a model here.")
@click.option("--model", help="The model to ask at that URL. Default: the only one it serves.")
@click.option(
    "--key",
    envvar="ADAPTERHUB_JUDGE_KEY",
    show_envvar=True,
    help="The API's key. Others on this machine can see command lines: the variable hides it.",
)
@click.option(
    "--judge-tokens",
    type=click.IntRange(min=1),
    default=_JUDGE_TOKENS,
    show_default=True,
    help="Tokens a verdict may take.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.01),
    default=120.0,
    show_default=True,
    help="Seconds to wait for an answer.",
)
@click.option(
    "--tries", type=click.IntRange(min=1), default=5, show_default=True, help="Of a request that fails."
)
@click.option(
    "--at-once", type=click.IntRange(1, 64), default=4, show_default=True, help="Requests at the same time."
)
def judge_command(
    a: str,
    b: str,
    questions: Path | None,
    out: Path,
    batch_size: int,
    max_new_tokens: int,
    base: str | None,
    endpoint: str | None,
    judge: str,
    model: str | None,
    key: str | None,
    judge_tokens: int,
    timeout: float,
    tries: int,
    at_once: int,
) -> None:
    """Let a judge model say which of A and B answers better, question by question, and print the folder.

    A and B are releases or base models (a folder, or owner/name[@version]), or JSONL files of answers
    (question_id, answer). Each pair is shown in both orders. Words without exactly one verdict are counted as
    not parsed. Everything is kept as it comes in: the same command goes on where it was stopped, and asks
    only what is missing. More systems join with the same --out; `arena report` rates them.
    """
    from adapterhub.cards.endpoint import Endpoint
    from adapterhub.cards.judging import check_complete, run_judge
    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.commands.contestants import Setting, load_judge

    if "://" not in judge and model is not None:
        raise click.UsageError("--model belongs to a --judge URL")
    with ExitStack() as stack:
        api = None
        if "://" in judge:  # reached before A and B answer, which may take hours
            api = Endpoint(
                judge, model, key, max_tokens=judge_tokens, timeout=timeout, tries=tries, at_once=at_once
            )
            stack.callback(api.close)
        setting = Setting(max_new_tokens, batch_size, base, endpoint)
        contest, names = _open_contest((a, b), questions, out, setting)
        it: Judge = api or load_judge(judge, Setting(judge_tokens, batch_size, None, endpoint))
        with progress_on_stderr("prompts") as report:
            done = run_judge(contest, *names, it, lambda at, total: report("judging", at, total))
        _tell_judged(contest, names, it, done)
        check_complete(done, str(out))
    click.echo(out)


@click.command("people")
@_contest_options
@click.option("--rater", default="person", show_default=True, help="Who judges.")
@click.option("--terminal", is_flag=True, help="Ask here, instead of on a page.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8090,
    show_default=True,
    help="Of the page; 0 takes a free one.",
)
def people_command(
    a: str,
    b: str,
    questions: Path | None,
    out: Path,
    batch_size: int,
    max_new_tokens: int,
    base: str | None,
    endpoint: str | None,
    rater: str,
    terminal: bool,
    port: int,
) -> None:
    """Let a person say which of A and B answers better, blind, and print the folder.

    A and B are as for `arena judge`. Who answered is not shown, and the order is shuffled. On a page that
    only this machine can reach (works by keyboard alone), or with --terminal here. Stop at any time: the same
    command goes on. Another --rater judges the same pairs, and `arena report` says how far they agree.
    """
    from adapterhub.cards.ballot import Ballot
    from adapterhub.commands.contestants import Setting

    setting = Setting(max_new_tokens, batch_size, base, endpoint)
    contest, names = _open_contest((a, b), questions, out, setting)
    ballot = Ballot(contest, *names, rater)
    if ballot.open:
        _ask_in_terminal(ballot) if terminal else _serve(ballot, port)
    click.echo(f"{ballot.judged} of {ballot.total} pairs judged by {rater}", err=True)
    click.echo(out)


def _open_contest(
    targets: tuple[str, str], questions: Path | None, out: Path, setting: Setting
) -> tuple[Contest, tuple[str, str]]:
    """The arena with both systems' answers in it, and what it calls them."""
    from adapterhub.cards.contest import Contest, kept_questions, read_tasks
    from adapterhub.commands.contestants import answer_missing, find_contestant

    asked = questions or kept_questions(out)
    tasks, source = read_tasks(asked)
    a, b = (find_contestant(target, setting.endpoint) for target in targets)
    if a.name == b.name:
        raise DataError(
            f"A and B are both called {a.name}", "rename one file or folder, or name two versions"
        )
    contest = Contest.open(out, tasks, source)
    contest.keep_questions(asked)
    for contestant in (a, b):
        answer_missing(contest, contestant, setting)
    return contest, (a.name, b.name)


def _tell_judged(contest: Contest, names: tuple[str, str], judge: Judge, done: Round) -> None:
    """What the judge has said of the pair, in this run and before."""
    judgments = contest.judgments(*names, judge.rater.name)
    wins: Counter[str] = Counter()
    for judgment in judgments:
        places = {"first": judgment.first, "second": judgment.second}
        wins[places.get(judgment.verdict, judgment.verdict)] += 1
    better = ", ".join(f"{name} {wins[name]:,}" for name in names)
    click.echo(
        f"{done.verdicts.total():,} of {done.asked:,} prompts judged by {judge.rater.name}; in all "
        f"{len(judgments):,} judgments: {better}, ties {wins['tie']:,}, not parsed {wins['unparsed']:,}",
        err=True,
    )


def _serve(ballot: Ballot, port: int) -> None:
    with serve_extra("the page needs", ", or take --terminal"):
        from adapterhub.cards.ballot import serve_ballot

        serve_ballot(ballot, port, lambda address: click.echo(f"judge on {address}", err=True))


def _ask_in_terminal(ballot: Ballot) -> None:
    """Question after question, until all are judged or the person stops."""
    from adapterhub.cards.ballot import VERDICTS
    from adapterhub.cards.escaping import visible

    keys = {"1": "first", "2": "second", "3": "tie"}
    while ballot.open:
        showing = ballot.open[0]
        click.echo(f"\n=== pair {ballot.judged + 1} of {ballot.total} ===", err=True)
        texts: list[tuple[str, Any]] = [(it["role"], it["content"]) for it in showing.task.messages]
        texts += [("answer 1", showing.first_text), ("answer 2", showing.second_text)]
        for name, text in texts:
            click.echo(f"\n{click.style(name, bold=True)}\n{visible(text).strip() or '(empty)'}", err=True)
        choice = click.prompt(
            "\nbetter: 1, 2, 3 equally good; l later, q stop",
            type=click.Choice([*keys, "l", "q"]),
            show_choices=False,
            err=True,
        )
        if choice == "q":
            return
        if choice == "l":
            ballot.skip()
        else:
            ballot.give(VERDICTS[keys[choice]])
