"""The base beside the adapter on the same questions: one loaded model, with the adapter off and on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterhub.cards.failures import find_failures
from adapterhub.cards.generation import Answer, Decoding, generate_answers
from adapterhub.cards.losses import RowLoss, measure_losses
from adapterhub.cards.questions import Question
from adapterhub.cards.scores import is_exact, score_exact_match, score_loss
from adapterhub.errors import TrainingError
from adapterhub.packaging.evidence import Example, FailureCase, ScoresEvidence
from adapterhub.packaging.manifest import DatasetLock, Hardware, Sha256

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

StageReport = Callable[[str, int, int], None]
"""Called with the stage in words, the rows done and the rows in all."""


@dataclass(frozen=True)
class Subject:
    """What is measured, and where: goes into the evidence as it is."""

    adapter_sha256: Sha256
    """Of adapter_model.safetensors."""
    version: str
    """The release's version."""
    data: DatasetLock
    """The rows that are asked."""
    limit: int | None
    """How many rows were taken from the top of the data; None: all."""
    left_out: int
    """Rows that did not fit the context."""
    tools: dict[str, str]
    """Package name to version."""
    hardware: Hardware


@dataclass(frozen=True)
class Evaluation:
    """What came out."""

    scores: ScoresEvidence
    failures: tuple[FailureCase, ...]


def evaluate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    subject: Subject,
    *,
    since: Mapping[str, str],
    report: StageReport,
) -> Evaluation:
    """Ask base and adapter the same questions and score both.

    The base is ``model`` with its adapter disabled: both run on the same weights in the same precision.
    Raises TrainingError when the device runs out of memory or a loss is not a number.
    """
    model.eval()
    began = time.perf_counter()
    base, base_losses = _measure_side(model, tokenizer, questions, decoding, "base", report)
    adapter, adapter_losses = _measure_side(model, tokenizer, questions, decoding, "adapter", report)
    settings = describe_decoding(tokenizer, decoding)
    scores = ScoresEvidence(
        adapter_sha256=subject.adapter_sha256,
        data=subject.data,
        decoding=settings,
        scores=(score_exact_match(questions, base, adapter), score_loss(base_losses, adapter_losses)),
        example=_find_example(questions, adapter),
        limit=subject.limit,
        left_out=subject.left_out,
        tools=subject.tools,
        hardware=subject.hardware,
        seconds=round(time.perf_counter() - began, 1),
    )
    failures = find_failures(
        questions, adapter, base, decoding=settings, version=subject.version, since=since
    )
    return Evaluation(scores, failures)


def _measure_side(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    side: str,
    report: StageReport,
) -> tuple[list[Answer], list[RowLoss]]:
    """One side's answers and losses; ``side`` is ``base`` or ``adapter``."""
    import torch

    loss_stage, answer_stage = f"{side}: loss", f"{side}: answers"
    switched: AbstractContextManager[Any] = model.disable_adapter() if side == "base" else nullcontext()
    try:
        with switched:
            report(loss_stage, 0, len(questions))
            losses = measure_losses(model, questions, partial(report, loss_stage))
            report(answer_stage, 0, len(questions))
            answers = generate_answers(model, tokenizer, questions, decoding, partial(report, answer_stage))
    except torch.OutOfMemoryError as err:
        raise TrainingError(
            f"the device ran out of memory with {decoding.batch_size} questions at once",
            "choose a smaller --batch-size",
        ) from err
    for question, loss in zip(questions, losses, strict=True):
        if not math.isfinite(loss.nats):
            raise TrainingError(
                f"the {side}'s loss on {question.where} is not a finite number",
                "the weights are damaged or overflow: verify the release and its base",
            )
    return answers, losses


def _find_example(questions: Sequence[Question], answers: Sequence[Answer]) -> Example | None:
    """Of what is answered exactly, the question with the shortest prompt; the first of those."""
    right = [
        (question, answer)
        for question, answer in zip(questions, answers, strict=True)
        if is_exact(answer.text, question.reference)
    ]
    if not right:
        return None
    question, answer = min(right, key=lambda pair: len(pair[0].prompt_ids))
    return Example(messages=question.messages, answer=answer.text)


def describe_decoding(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> dict[str, Any]:
    """The decoding settings as they stand in the evidence."""
    return {
        "method": "greedy",
        "max_new_tokens": decoding.max_new_tokens,
        "batch_size": decoding.batch_size,
        "end_tokens": tokenizer.convert_ids_to_tokens(list(decoding.end_tokens)),
    }
