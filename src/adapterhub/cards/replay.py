"""Failure cases asked again: of the release that they were found on, of another, or of the base alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub.cards.checks import passes, read_check
from adapterhub.cards.generation import Answer, Decoding, generate_answers
from adapterhub.cards.progress import StageReport
from adapterhub.cards.questions import Prompt, pose_prompt
from adapterhub.errors import DataError, TrainingError
from adapterhub.packaging.evidence import FailureCase

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Status = Literal["still failing", "fixed", "new", "flaky"]
STATUSES: tuple[Status, ...] = ("still failing", "fixed", "new", "flaky")


class _Settings(BaseModel):
    """The part of a case's recorded decoding that a replay follows."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    method: Literal["greedy"]
    max_new_tokens: int = Field(ge=1, le=32_768)
    batch_size: int = Field(ge=1, le=1024)


@dataclass(frozen=True)
class Replayed:
    """What became of one case."""

    case: FailureCase
    status: Status
    answer: str
    """As answered in a batch of the recorded size."""
    answer_alone: str
    """As answered by itself."""


def replay(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[FailureCase],
    earlier: Sequence[FailureCase] | None,
    *,
    end_tokens: tuple[int, ...],
    context: int | None,
    report: StageReport,
) -> list[Replayed]:
    """Ask every case greedily, with its recorded limit of tokens, and hold the answer to its check.

    Each is asked twice, in batches of the recorded size and alone: in 16 and 4 bits, rounding depends on the
    batch, and a case that passes only once is ``flaky``. ``earlier`` are the cases to compare with: what is
    not among them and fails is ``new``. Raises DataError for a case that cannot be asked, TrainingError when
    the device runs out of memory.
    """
    import torch

    model.eval()
    prompts = [_pose(tokenizer, case, context) for case in cases]
    groups: dict[_Settings, list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        groups[_settings(case)].append(index)
    together: dict[int, Answer] = {}
    alone: dict[int, Answer] = {}
    try:
        for settings, members in groups.items():
            asked = [prompts[index] for index in members]
            for stage, size, answers in (
                ("in batches", settings.batch_size, together),
                ("alone", 1, alone),
            ):
                decoding = Decoding(settings.max_new_tokens, size, end_tokens, context)
                shown = _shifted(partial(report, stage), len(answers), len(cases))
                found = generate_answers(model, tokenizer, asked, decoding, shown)
                answers.update(zip(members, found, strict=True))
    except torch.OutOfMemoryError as err:
        raise TrainingError(
            "the device ran out of memory with the recorded batch sizes", "replay on a larger device"
        ) from err
    known = None if earlier is None else {case.id for case in earlier}
    return [
        Replayed(case, _judge(case, together[at], alone[at], known), together[at].text, alone[at].text)
        for at, case in enumerate(cases)
    ]


def join_cases(own: Sequence[FailureCase], earlier: Sequence[FailureCase]) -> list[FailureCase]:
    """The earlier cases, then those of the release's own that are not among them."""
    known = {case.id for case in earlier}
    return [*earlier, *(case for case in own if case.id not in known)]


def _judge(case: FailureCase, together: Answer, alone: Answer, known: set[str] | None) -> Status:
    where = f"failure case {case.id}"
    check = read_check(case.expected, where)
    right, right_alone = (passes(check, answer.text, where) for answer in (together, alone))
    if right != right_alone:
        return "flaky"
    if right:
        return "fixed"
    return "still failing" if known is None or case.id in known else "new"


def _pose(tokenizer: PreTrainedTokenizerBase, case: FailureCase, context: int | None) -> Prompt:
    prompt = pose_prompt(tokenizer, case.messages, f"failure case {case.id}")
    read_check(case.expected, prompt.where)
    if context is not None and len(prompt.prompt_ids) >= context:
        raise DataError(
            f"{prompt.where} has {len(prompt.prompt_ids):,} tokens, and the model's context is {context:,}",
            "replay it on a model with a longer context",
        )
    return prompt


def _settings(case: FailureCase) -> _Settings:
    try:
        return _Settings.model_validate(case.decoding)
    except ValidationError as err:
        key = ".".join(str(part) for part in err.errors()[0]["loc"])
        raise DataError(
            f"failure case {case.id}: decoding: {key}: {err.errors()[0]['msg']}",
            "record the case again, with `adapterhub eval` or `adapterhub failures add`",
        ) from err


def _shifted(report: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    """Reports of one group as a part of all."""
    return lambda done, _group: report(before + done, total)
