"""A judge model's verdicts: the prompt that it gets, what its words say, and the round through an arena."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

from adapterhub.cards.contest import Contest, Showing
from adapterhub.cards.generation import Decoding, Report, generate_answers
from adapterhub.cards.judgments import Rater, Verdict
from adapterhub.cards.questions import pose_prompt
from adapterhub.cards.snippets import TEMPLATES
from adapterhub.errors import AdapterHubError

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = TEMPLATES / "judge.txt.j2"
_VERDICTS: Mapping[str, Verdict] = {"A": "first", "B": "second", "TIE": "tie"}
_SAID = re.compile(r"\[\[\s*(A|B|TIE)\s*\]\]", re.IGNORECASE)
_THOUGHT = re.compile(r"\A\s*<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_OUTAGE = 3
"""So many failures one after another, all of the endpoint's making, end the round."""
_KEPT_CHARS = 8000


@dataclass(frozen=True)
class Reply:
    """What the judge said to one prompt."""

    text: str
    finished: bool = True
    """Whether it ended by itself, rather than at the token limit."""


@dataclass(frozen=True)
class Failure:
    """A prompt that got no reply: it stays to be asked by a later run."""

    reason: str
    is_outage: bool
    """Whether the judge itself is to blame, rather than this one prompt."""


class Judge(Protocol):
    """A model that is asked for verdicts."""

    @property
    def rater(self) -> Rater:
        """How the arena calls it."""

    def reply(self, prompts: Sequence[str]) -> Iterator[Reply | Failure]:
        """Its reply to each prompt, in order, as they come in."""


@dataclass
class Round:
    """What became of one round of questions to a judge."""

    asked: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """How many prompts got no reply, by reason."""


def prompt_sha256() -> str:
    """Of the prompt's template, as it is shipped."""
    return sha256(PROMPT.read_bytes()).hexdigest()


def write_prompt(showing: Showing) -> str:
    """What the judge is asked. Its marks depend on the texts: no answer can foresee them and close one."""
    asked = "\0".join(f"{message['role']}\0{message['content']}" for message in showing.task.messages)
    content = "\0".join((asked, showing.first_text, showing.second_text))
    values = {
        "messages": showing.task.messages,
        "first": showing.first_text,
        "second": showing.second_text,
        "mark": sha256(content.encode()).hexdigest()[:12],
    }
    return _template().render(values)


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Plain text for a model, nothing to escape: a mark that the texts do not hold keeps them apart.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(PROMPT.name)


def read_verdict(reply: Reply) -> Verdict:
    """The verdict in a judge's words, where exactly one is in them; else ``unparsed``.

    A reply that was cut off, that names none, or that names several gives none, and none is guessed. What a
    reasoning model thinks before it answers does not count.
    """
    if not reply.finished:
        return "unparsed"
    said = {match.upper() for match in _SAID.findall(_THOUGHT.sub("", reply.text))}
    return _VERDICTS[said.pop()] if len(said) == 1 else "unparsed"


def both_orders(a: str, b: str) -> Sequence[tuple[str, str]]:
    """A judge model sees every pair in both orders: its liking for a place shows, and cancels out."""
    return (a, b), (b, a)


def run_judge(contest: Contest, a: str, b: str, judge: Judge, report: Report) -> Round:
    """Ask the judge for every verdict on ``a`` and ``b`` that the arena does not hold yet.

    Each judgment is kept as it comes in. Prompts without a reply are counted, and left to a later run; when
    the judge fails several times in a row the round ends. Raises AdapterHubError for a judge that refuses
    everything.
    """
    contest.admit(judge.rater)
    name = judge.rater.name
    showings = contest.unjudged(a, b, name, lambda _task: both_orders(a, b))
    done = Round(len(showings))
    in_a_row = 0
    replies = judge.reply([write_prompt(showing) for showing in showings])
    for number, (showing, reply) in enumerate(zip(showings, replies, strict=False), 1):
        if isinstance(reply, Failure):
            done.failures[reply.reason] += 1
            in_a_row = in_a_row + 1 if reply.is_outage else 0
            if in_a_row == _OUTAGE:
                break
        else:
            in_a_row = 0
            verdict = read_verdict(reply)
            contest.add_judgment(showing.judged(verdict, name, reply.text[:_KEPT_CHARS]))
            done.verdicts[verdict] += 1
        report(number, len(showings))
    return done


def check_complete(done: Round, where: str) -> None:
    """Raise AdapterHubError when judgments are missing, with how many and why."""
    missing = done.asked - done.verdicts.total()
    if not missing:
        return
    reasons = "; ".join(f"{reason} ({count:,})" for reason, count in done.failures.most_common(3))
    raise AdapterHubError(
        f"{missing:,} of {done.asked:,} judgments are missing in {where}: {reasons}",
        "run the same command again: it asks only for what is missing; or name a judge that can answer those",
    )


@dataclass(frozen=True)
class LocalJudge:
    """A model that is loaded here."""

    rater: Rater
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding

    def reply(self, prompts: Sequence[str]) -> Iterator[Reply | Failure]:
        """Greedy replies, a batch at a time; a prompt that does not fit the context is a failure."""
        size = self.decoding.batch_size
        for start in range(0, len(prompts), size):
            posed = [
                pose_prompt(self.tokenizer, [{"role": "user", "content": prompt}], "the judge's prompt")
                for prompt in prompts[start : start + size]
            ]
            context = self.decoding.context
            fitting = [it for it in posed if context is None or len(it.prompt_ids) < context]
            answers = iter(generate_answers(self.model, self.tokenizer, fitting, self.decoding, _quietly))
            for it in posed:
                if any(it is other for other in fitting):
                    answer = next(answers)
                    yield Reply(answer.text, answer.finished)
                else:
                    yield Failure(f"the prompt does not fit the judge's context of {context:,} tokens", False)


def _quietly(_done: int, _total: int) -> None:
    """The round reports."""
