"""Answers to many questions at once: greedy ones, or samples drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterhub.cards.questions import Prompt
from adapterhub.packaging.held import weights_held

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Left padding is computed like the rest; a batch of its own costs a step's fixed part for every new token.
# Tokens that such a part is worth: an estimate for small models on a CPU, not measured.
_STEP_COST = 16

Report = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn at random."""

    temperature: float
    """Divides the logits; above 0."""
    top_p: float
    """Only the likeliest tokens that together reach this probability; 1: all."""
    seed: int
    """Of torch's generator, before each batch."""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: a rerun on the same machine gives the same."""

    max_new_tokens: int
    """Tokens an answer may take, its end token included."""
    batch_size: int
    """Questions at once."""
    end_tokens: tuple[int, ...]
    """Token ids that end an answer."""
    context: int | None = None
    """Tokens the model can hold; None when it sets no limit."""
    sampling: Sampling | None = None
    """None: greedy."""


@dataclass(frozen=True)
class Answer:
    """What a model said to one question."""

    text: str
    """Decoded up to the end token; special tokens inside it are kept visible."""
    finished: bool
    """Whether it ended by itself, rather than at the token limit."""


def generate_answers(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Prompt],
    decoding: Decoding,
    report: Report,
) -> list[Answer]:
    """The model's answer to each question, in the questions' order.

    Prompts are batched by length with left padding, in an order that depends on the questions alone. In
    bf16 an answer can still depend on its batch mates' lengths through rounding, so the batch size belongs
    to the result.
    """
    answers: list[Answer | None] = [None] * len(questions)
    done = 0
    with _plain_settings(model, decoding), _own_randomness(model), weights_held(model):
        for batch in batches(questions, decoding):
            prompts = [questions[index].prompt_ids for index in batch]
            for index, tokens in zip(batch, _continue(model, prompts, decoding), strict=True):
                answers[index] = _read(tokenizer, tokens, decoding.end_tokens)
            done += len(batch)
            report(done, len(questions))
    return [answer for answer in answers if answer is not None]


def part_of(report: Report, before: int, total: int) -> Report:
    """Reports of a group of questions as a part of all ``total``, ``before`` of which are done."""
    return lambda done, _group: report(before + done, total)


def batches(questions: Sequence[Prompt], decoding: Decoding) -> list[list[int]]:
    """Indices of ``questions`` in batches, longest prompts first (what does not fit in memory shows at once).

    A batch may generate up to the context less its longest prompt; a question whose reference would then
    be cut (or that has none, and would have less than it may take) starts a new batch, as does one so short
    that its padding would cost more than the steps of another batch.
    """
    order = sorted(range(len(questions)), key=lambda index: (-len(questions[index].prompt_ids), index))
    result: list[list[int]] = []
    for index in order:
        reference_tokens = questions[index].reference_tokens
        needed = min(reference_tokens or decoding.max_new_tokens, decoding.max_new_tokens)
        if (
            result
            and len(result[-1]) < decoding.batch_size
            and needed <= _room(questions, result[-1], decoding)
            and _padding(questions, [*result[-1], index]) <= _STEP_COST * decoding.max_new_tokens
        ):
            result[-1].append(index)
        else:
            result.append([index])
    return result


def _padding(questions: Sequence[Prompt], batch: Sequence[int]) -> int:
    """Tokens of padding in the batch; its first question has the longest prompt."""
    width = len(questions[batch[0]].prompt_ids)
    return sum(width - len(questions[index].prompt_ids) for index in batch)


def _room(questions: Sequence[Prompt], batch: Sequence[int], decoding: Decoding) -> int:
    """New tokens the batch may take; its first question has the longest prompt."""
    if decoding.context is None:
        return decoding.max_new_tokens
    return min(decoding.max_new_tokens, decoding.context - len(questions[batch[0]].prompt_ids))


def _continue(model: Any, prompts: Sequence[list[int]], decoding: Decoding) -> list[list[int]]:
    """New tokens after each prompt, up to the batch's end: what follows a row's end token is padding."""
    import torch

    width = max(len(prompt) for prompt in prompts)
    filler = decoding.end_tokens[0]
    ids = [[filler] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    room = decoding.max_new_tokens if decoding.context is None else decoding.context - width
    if decoding.sampling is not None:
        torch.manual_seed(decoding.sampling.seed)
    with torch.inference_mode():
        output: torch.Tensor = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=min(decoding.max_new_tokens, room),
        )
    new_tokens: list[list[int]] = output[:, width:].tolist()
    return new_tokens


def _read(tokenizer: PreTrainedTokenizerBase, tokens: list[int], end_tokens: Sequence[int]) -> Answer:
    end = next((at for at, token in enumerate(tokens) if token in end_tokens), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Answer(str(text), finished=end is not None)


def draw_samples(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Prompt,
    samples: int,
    decoding: Decoding,
) -> list[Answer]:
    """``samples`` answers to one question, which depend on it, the seed and the batch size alone.

    Each batch starts from a seed of its own: the recorded one, the next, and so on.
    """
    answers: list[Answer] = []
    assert decoding.sampling is not None
    for number, start in enumerate(range(0, samples, decoding.batch_size)):
        sampling = replace(decoding.sampling, seed=decoding.sampling.seed + number)
        asked = [question] * min(decoding.batch_size, samples - start)
        answers += generate_answers(
            model, tokenizer, asked, replace(decoding, sampling=sampling), lambda _done, _total: None
        )
    return answers


@contextmanager
def _own_randomness(model: Any) -> Iterator[None]:
    """Leave the process's random state as it was."""
    import torch

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _plain_settings(model: Any, decoding: Decoding) -> Iterator[None]:
    """Generate as ``decoding`` says and not otherwise: the base's own settings (penalties) stand aside."""
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.generation_config
    drawn: dict[str, Any] = {"do_sample": False}
    if decoding.sampling is not None:
        settings = decoding.sampling
        drawn = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    inner.generation_config = GenerationConfig(
        eos_token_id=list(decoding.end_tokens), pad_token_id=decoding.end_tokens[0], **drawn
    )
    # The last position of each prompt is a strided slice, for which torch multiplies one copy of the whole
    # output layer a row on the CPU: a fifth of the time, and gigabytes.
    head = inner.get_output_embeddings().register_forward_pre_hook(
        lambda _head, args: (args[0].contiguous(),)
    )
    try:
        yield
    finally:
        head.remove()
        inner.generation_config = before
