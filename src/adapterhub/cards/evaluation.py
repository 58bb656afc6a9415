"""The base beside the adapter on the same questions: one loaded model, with the adapter off and on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from adapterhub.cards.failures import find_failures
from adapterhub.cards.generation import Answer, Decoding, generate_answers
from adapterhub.cards.losses import RowLoss, measure_losses
from adapterhub.cards.paired import count_discordant, find, find_in_losses, loss_difference, mcnemar
from adapterhub.cards.questions import Question
from adapterhub.cards.scores import (
    bits_per_nat,
    loss_interval,
    mean_loss,
    tell_exact,
    wilson_interval,
)
from adapterhub.errors import TrainingError
from adapterhub.packaging.evidence import Contamination, Example, FailureCase, Score, ScoresEvidence
from adapterhub.packaging.manifest import BaseMismatch, DatasetLock, Hardware, Sha256

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LARGEST_LOSS = 700.0  # nats a token; e^710 is no float

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
    contamination: Contamination | None = None
    """What the rows share with the training rows; None: not looked for."""
    base_mismatch: BaseMismatch | None = None
    """The base, if it is not the one trained on, and why it was allowed."""


@dataclass(frozen=True)
class Measured:
    """What one model says to the questions, and how surprised it is by their references."""

    answers: list[Answer]
    losses: list[RowLoss]


@dataclass(frozen=True)
class Evaluation:
    """What came out."""

    scores: ScoresEvidence
    failures: tuple[FailureCase, ...]
    base: Measured
    adapter: Measured


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
    with model.disable_adapter():
        base = measure(model, tokenizer, questions, decoding, "base", report)
    adapter = measure(model, tokenizer, questions, decoding, "adapter", report)
    settings = describe_decoding(tokenizer, decoding)
    scores = ScoresEvidence(
        adapter_sha256=subject.adapter_sha256,
        data=subject.data,
        decoding=settings,
        scores=score(questions, base, adapter),
        example=_find_example(questions, adapter.answers),
        limit=subject.limit,
        left_out=subject.left_out,
        contamination=subject.contamination,
        base_mismatch=subject.base_mismatch,
        tools=subject.tools,
        hardware=subject.hardware,
        seconds=round(time.perf_counter() - began, 1),
    )
    failures = find_failures(
        questions, adapter.answers, base.answers, decoding=settings, version=subject.version, since=since
    )
    return Evaluation(scores, failures, base, adapter)


def score(questions: Sequence[Question], base: Measured, adapter: Measured) -> tuple[Score, ...]:
    """Exact match, loss, perplexity and bits a byte of both sides, the first two tested row by row."""
    rows = len(questions)
    right = tell_exact(questions, base.answers), tell_exact(questions, adapter.answers)
    gained, lost = count_discordant(*right)
    p_value = mcnemar(gained, lost)
    hits = sum(right[0]), sum(right[1])
    exact = Score(
        metric="exact_match",
        unit="share of rows",
        rows=rows,
        base=hits[0] / rows,
        adapter=hits[1] / rows,
        base_interval=wilson_interval(hits[0], rows),
        adapter_interval=wilson_interval(hits[1], rows),
        p_value=p_value,
        verdict=find(gained, lost, p_value),
    )
    _, difference = loss_difference(adapter.losses, base.losses)
    loss = Score(
        metric="loss",
        unit="nats a token",
        rows=rows,
        base=mean_loss(base.losses),
        adapter=mean_loss(adapter.losses),
        base_interval=loss_interval(base.losses),
        adapter_interval=loss_interval(adapter.losses),
        tokens=sum(row.tokens for row in adapter.losses),
        verdict=find_in_losses(difference),
    )
    factor = bits_per_nat(questions, adapter.losses)
    return (
        exact,
        loss,
        _converted(loss, "perplexity", "perplexity", math.exp),
        _converted(loss, "bits_per_byte", "bits a byte", lambda nats: nats * factor),
    )


def _converted(
    loss: Score, metric: Literal["perplexity", "bits_per_byte"], unit: str, convert: Callable[[float], float]
) -> Score:
    """The same measurement in another unit: the test of the loss is not made again."""

    def both(interval: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if interval is None else (convert(interval[0]), convert(interval[1]))

    return loss.model_copy(
        update={
            "metric": metric,
            "unit": unit,
            "base": convert(loss.base),
            "adapter": convert(loss.adapter),
            "base_interval": both(loss.base_interval),
            "adapter_interval": both(loss.adapter_interval),
            "verdict": None,
        }
    )


def measure(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    side: str,
    report: StageReport,
) -> Measured:
    """One model's answers and losses; ``side`` names it in words, like ``base``.

    Raises TrainingError when the device runs out of memory or a loss is no sensible number.
    """
    loss_stage, answer_stage = f"{side}: loss", f"{side}: answers"
    with out_of_memory_in_words(decoding.batch_size):
        report(loss_stage, 0, len(questions))
        losses = measure_losses(model, questions, partial(report, loss_stage))
        report(answer_stage, 0, len(questions))
        answers = generate_answers(model, tokenizer, questions, decoding, partial(report, answer_stage))
    for question, loss in zip(questions, losses, strict=True):
        if not math.isfinite(loss.nats) or loss.nats > _LARGEST_LOSS * loss.tokens:
            raise TrainingError(
                f"the {side}'s loss on {question.where} is not a finite number",
                "the weights are damaged or overflow: verify the release and its base",
            )
    return Measured(answers, losses)


@contextmanager
def out_of_memory_in_words(batch_size: int) -> Iterator[None]:
    """A device that runs out of memory inside raises TrainingError."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as err:
        raise TrainingError(
            f"the device ran out of memory with {batch_size} questions at once",
            "choose a smaller --batch-size",
        ) from err


def _find_example(questions: Sequence[Question], answers: Sequence[Answer]) -> Example | None:
    """Of what is answered exactly, the question with the shortest prompt; the first of those."""
    exact = tell_exact(questions, answers)
    right = [
        pair for pair, is_right in zip(zip(questions, answers, strict=True), exact, strict=True) if is_right
    ]
    if not right:
        return None
    question, answer = min(right, key=lambda pair: len(pair[0].prompt_ids))
    return Example(messages=question.messages, answer=answer.text)


def describe_decoding(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> dict[str, Any]:
    """The decoding settings as they stand in the evidence."""
    drawn = {} if decoding.sampling is None else asdict(decoding.sampling)
    return {
        "method": "sampling" if drawn else "greedy",
        "max_new_tokens": decoding.max_new_tokens,
        "batch_size": decoding.batch_size,
        **drawn,
        "end_tokens": tokenizer.convert_ids_to_tokens(list(decoding.end_tokens)),
    }
