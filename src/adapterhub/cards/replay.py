"""Failure cases asked again: of the release that they were found on, of another, or of the base alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from adapterhub.cards.checks import passes, read_check
from adapterhub.cards.failures import failure_rate
from adapterhub.cards.generation import (
    Answer,
    Decoding,
    Sampling,
    draw_samples,
    generate_answers,
    part_of,
)
from adapterhub.cards.progress import StageReport
from adapterhub.cards.questions import Prompt, pose_prompt
from adapterhub.errors import DataError, TrainingError
from adapterhub.packaging.evidence import FailureCase, FailureRate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Status = Literal["still failing", "fixed", "new", "flaky"]
STATUSES: tuple[Status, ...] = ("still failing", "fixed", "new", "flaky")


class _Greedy(BaseModel):
    """The part of a case's recorded decoding that a replay follows."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    method: Literal["greedy"]
    max_new_tokens: int = Field(ge=1, le=32_768)
    batch_size: int = Field(ge=1, le=1024)


class _Sampled(BaseModel):
    """The same of a case whose answers were drawn at random."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    method: Literal["sampling"]
    max_new_tokens: int = Field(ge=1, le=32_768)
    batch_size: int = Field(ge=1, le=1024)
    temperature: float = Field(gt=0, le=100)
    top_p: float = Field(gt=0, le=1)
    seed: int = Field(ge=0, lt=2**63)


_Settings = Annotated[_Greedy | _Sampled, Field(discriminator="method")]
_SETTINGS: TypeAdapter[_Greedy | _Sampled] = TypeAdapter(_Settings)


@dataclass(frozen=True)
class Draws:
    """Every case answered several times at random, whatever its record says."""

    samples: int
    sampling: Sampling


@dataclass(frozen=True)
class Replayed:
    """What became of one case."""

    case: FailureCase
    status: Status
    answer: str
    """As answered in a batch of the recorded size; with sampling, the first that fails, or else the first."""
    answer_alone: str | None
    """As answered by itself; None with sampling."""
    rate: FailureRate | None = None
    """How often it fails with sampling; None: greedy."""


def replay(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[FailureCase],
    earlier: Sequence[FailureCase] | None,
    *,
    end_tokens: tuple[int, ...],
    context: int | None,
    report: StageReport,
    draws: Draws | None = None,
) -> list[Replayed]:
    """Ask every case with its recorded decoding, and hold the answers to its check.

    A case recorded with greedy decoding is asked twice, in batches of the recorded size and alone: in 16 and
    4 bits, rounding depends on the batch. One recorded with sampling is drawn as often, from the same seed.
    A case that passes in some answers and fails in others is ``flaky``. ``earlier`` are the cases to compare
    with: what is not among them and fails is ``new``. ``draws`` replaces the recorded decoding by sampling.
    Raises DataError for a case that cannot be asked, TrainingError when the device runs out of memory.
    """
    import torch

    model.eval()
    prompts = [_pose(tokenizer, case, context) for case in cases]
    settings = [_settings(case) for case in cases]
    known = None if earlier is None else {case.id for case in earlier}
    sampled = [at for at, it in enumerate(settings) if draws is not None or isinstance(it, _Sampled)]
    greedy = {at: it for at, it in enumerate(settings) if isinstance(it, _Greedy) and at not in set(sampled)}
    done: dict[int, Replayed] = {}
    try:
        together, alone = _ask_greedily(model, tokenizer, prompts, greedy, end_tokens, context, report)
        for at in greedy:
            status = _judge(cases[at], [together[at], alone[at]], known)[0]
            done[at] = Replayed(cases[at], status, together[at].text, alone[at].text)
        for number, at in enumerate(sampled, 1):
            asked = _drawn(cases[at], settings[at], draws, end_tokens, context)
            answers = draw_samples(model, tokenizer, prompts[at], *asked)
            status, failed = _judge(cases[at], answers, known)
            shown = (failed or answers)[0].text
            rate = failure_rate(len(failed), len(answers))
            done[at] = Replayed(cases[at], status, shown, None, rate)
            report("samples", number, len(sampled))
    except torch.OutOfMemoryError as err:
        raise TrainingError(
            "the device ran out of memory with the recorded batch sizes", "replay on a larger device"
        ) from err
    return [done[at] for at in range(len(cases))]


def _ask_greedily(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: Mapping[int, _Greedy],
    end_tokens: tuple[int, ...],
    context: int | None,
    report: StageReport,
) -> tuple[dict[int, Answer], dict[int, Answer]]:
    """Index of a prompt -> its answer, in batches of the recorded size and alone."""
    groups: dict[_Greedy, list[int]] = defaultdict(list)
    for index, recorded in settings.items():
        groups[recorded].append(index)
    together: dict[int, Answer] = {}
    alone: dict[int, Answer] = {}
    for recorded, members in groups.items():
        asked = [prompts[index] for index in members]
        for stage, size, answers in (
            ("in batches", recorded.batch_size, together),
            ("alone", 1, alone),
        ):
            decoding = Decoding(recorded.max_new_tokens, size, end_tokens, context)
            shown = part_of(partial(report, stage), len(answers), len(settings))
            found = generate_answers(model, tokenizer, asked, decoding, shown)
            answers.update(zip(members, found, strict=True))
    return together, alone


def _drawn(
    case: FailureCase,
    recorded: _Greedy | _Sampled,
    draws: Draws | None,
    end_tokens: tuple[int, ...],
    context: int | None,
) -> tuple[int, Decoding]:
    """How many samples of a case, and how: as ``draws`` says, or else as it was recorded."""
    if draws is not None:
        samples, sampling = draws.samples, draws.sampling
    else:
        assert isinstance(recorded, _Sampled)
        if case.rate is None:
            raise DataError(
                f"failure case {case.id} was sampled, and says not how often",
                "record the case again, with `adapterhub failures add --samples`",
            )
        samples = case.rate.samples
        sampling = Sampling(recorded.temperature, recorded.top_p, recorded.seed)
    decoding = Decoding(recorded.max_new_tokens, recorded.batch_size, end_tokens, context, sampling)
    return samples, decoding


def join_cases(own: Sequence[FailureCase], earlier: Sequence[FailureCase]) -> list[FailureCase]:
    """The earlier cases, then those of the release's own that are not among them."""
    known = {case.id for case in earlier}
    return [*earlier, *(case for case in own if case.id not in known)]


def _judge(
    case: FailureCase, answers: Sequence[Answer], known: set[str] | None
) -> tuple[Status, list[Answer]]:
    """What the answers say of a case, and those of them that fail."""
    where = f"failure case {case.id}"
    check = read_check(case.expected, where)
    failed = [one for one in answers if not passes(check, one.text, where, finished=one.finished)]
    if not failed:
        return "fixed", failed
    if len(failed) < len(answers):
        return "flaky", failed
    return ("still failing" if known is None or case.id in known else "new"), failed


def _pose(tokenizer: PreTrainedTokenizerBase, case: FailureCase, context: int | None) -> Prompt:
    prompt = pose_prompt(tokenizer, case.messages, f"failure case {case.id}")
    read_check(case.expected, prompt.where)
    if context is not None and len(prompt.prompt_ids) >= context:
        raise DataError(
            f"{prompt.where} has {len(prompt.prompt_ids):,} tokens, and the model's context is {context:,}",
            "replay it on a model with a longer context",
        )
    return prompt


def _settings(case: FailureCase) -> _Greedy | _Sampled:
    try:
        return _SETTINGS.validate_python(case.decoding)
    except ValidationError as err:
        first = err.errors()[0]
        parts = [str(part) for part in first["loc"] if part not in ("greedy", "sampling")]
        raise DataError(
            f"failure case {case.id}: decoding: {'.'.join(parts) or 'method'}: {first['msg']}",
            "record the case again, with `adapterhub eval` or `adapterhub failures add`",
        ) from err
