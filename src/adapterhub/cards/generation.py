"""Answers to many questions at once: greedy ones, or samples drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterhub.cards.questions import Prompt
from adapterhub.packaging.held import weights_held
from adapterhub.packaging.unwrapping import unwrap

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    limits: Sequence[int] | None = None,
) -> list[Answer]:
    """The model's answer to each question, in the questions' order.

    ``limits`` are the tokens that each answer may take; None: the decoding's for all. Prompts are asked
    together in an order that depends on the questions and limits alone, and the next ones start as answers
    end. Rounding depends on what is computed together, so the batch size belongs to the result.
    """
    import torch

    from adapterhub.cards.continuing import continue_prompts

    prompts = [question.prompt_ids for question in questions]
    most = list(limits) if limits is not None else [decoding.max_new_tokens] * len(questions)
    if decoding.context is not None:
        most = [min(limit, decoding.context - len(ids)) for limit, ids in zip(most, prompts, strict=True)]
    total = len(questions)
    with (
        _plain_settings(model, decoding),
        _own_randomness(model),
        weights_held(model),
        torch.inference_mode(),
    ):
        if decoding.sampling is not None:
            torch.manual_seed(decoding.sampling.seed)
        said = continue_prompts(
            model, prompts, most, decoding.batch_size, decoding.end_tokens, lambda done: report(done, total)
        )
        if said is None:
            said = _continue_whole(model, prompts, most, decoding, report)
    return [_read(tokenizer, tokens, decoding.end_tokens) for tokens in said]


def part_of(report: Report, before: int, total: int) -> Report:
    """Reports of a group of questions as a part of all ``total``, ``before`` of which are done."""
    return lambda done, _group: report(before + done, total)


def _continue_whole(
    model: Any, prompts: Sequence[list[int]], limits: Sequence[int], decoding: Decoding, report: Report
) -> list[list[int]]:
    """New tokens after each prompt, by a model whose cache holds for whole batches only, to their last end.

    A batch takes prompts of one limit, so that none is cut by its mates' length.
    """
    import torch

    said: list[list[int]] = [[] for _ in prompts]
    done = 0
    for batch in _whole_batches(prompts, limits, decoding.batch_size):
        width = max(len(prompts[at]) for at in batch)
        ids = [[decoding.end_tokens[0]] * (width - len(prompts[at])) + prompts[at] for at in batch]
        mask = [[0] * (width - len(prompts[at])) + [1] * len(prompts[at]) for at in batch]
        output: torch.Tensor = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=limits[batch[0]],
        )
        for at, tokens in zip(batch, output[:, width:].tolist(), strict=True):
            said[at] = tokens
        done += len(batch)
        report(done, len(prompts))
    return said


def _whole_batches(prompts: Sequence[list[int]], limits: Sequence[int], size: int) -> list[list[int]]:
    """Indices of ``prompts``, at most ``size`` of one limit in each batch; the longest first."""
    result: list[list[int]] = []
    for at in sorted(range(len(prompts)), key=lambda at: (-limits[at], -len(prompts[at]), at)):
        if result and len(result[-1]) < size and limits[result[-1][0]] == limits[at]:
            result[-1].append(at)
        else:
            result.append([at])
    return result


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

    inner = unwrap(model)
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
