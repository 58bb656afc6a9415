"""Generation, loss and evaluation on a small real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from adapterhub.cards.evaluation import Subject, evaluate
from adapterhub.cards.generation import Decoding, generate_answers
from adapterhub.cards.losses import measure_losses
from adapterhub.cards.questions import Question, answer_budget, pose
from adapterhub.errors import TrainingError
from adapterhub.packaging.manifest import DatasetLock, Hardware

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PROMPTS = [
    "Two apples",
    "The quick brown fox jumps over the lazy dog",
    "What is the capital of France?",
    "0123",
    "Ann",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def model(tiny_base: Path, tiny_adapter: Path) -> PeftModel:
    """In fp32, where padding cannot change an answer by rounding."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    return PeftModel.from_pretrained(base, tiny_adapter).eval()


@pytest.fixture(scope="module")
def questions(tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    return [make_question(tokenizer, prompt, f"{prompt} please") for prompt in PROMPTS]


def make_question(tokenizer: PreTrainedTokenizerBase, prompt: str, reference: str) -> Question:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reference}]
    head = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    answer = tokenizer(f"{reference}<|im_end|>", add_special_tokens=False)["input_ids"]
    return pose(
        tokenizer, messages, "test.jsonl, line 1", input_ids=head + answer, labels=[-100] * len(head) + answer
    )


def decoding(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Decoding:
    return Decoding(
        **{"max_new_tokens": 12, "batch_size": 2, "end_tokens": (tokenizer.eos_token_id,), **changes}
    )


def ignore(_done: int, _total: int) -> None:
    """Progress nobody reads."""


def test_a_question_is_the_prompt_through_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    question = make_question(tokenizer, "Two apples", "2")
    assert (
        tokenizer.decode(question.prompt_ids)
        == "<|im_start|>user\nTwo apples<|im_end|>\n<|im_start|>assistant\n"
    )
    assert question.reference_tokens == 2  # the digit and the end token
    assert question.fits(len(question.input_ids))
    assert not question.fits(len(question.input_ids) - 1)
    assert question.fits(None)


def test_the_answer_budget_holds_every_reference(questions: list[Question]) -> None:
    assert answer_budget(questions) >= max(question.reference_tokens for question in questions) + 8


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batched_answers_are_those_of_one_at_a_time(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question], batch_size: int
) -> None:
    import torch

    expected = []
    for question in questions:
        ids = torch.tensor([question.prompt_ids])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        text = tokenizer.decode(output[0, ids.shape[1] :])
        expected.append(text.partition("<|im_end|>")[0])
    answers = generate_answers(
        model, tokenizer, questions, decoding(tokenizer, batch_size=batch_size), ignore
    )
    assert [answer.text for answer in answers] == expected


def test_the_bases_own_sampling_and_penalties_stand_aside_and_come_back(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> None:
    plain = generate_answers(model, tokenizer, questions, decoding(tokenizer), ignore)
    inner = model.get_base_model()
    before = dict(inner.generation_config.to_dict())
    inner.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1
    )
    try:
        assert generate_answers(model, tokenizer, questions, decoding(tokenizer), ignore) == plain
        assert inner.generation_config.repetition_penalty == 9.0
    finally:
        inner.generation_config.update(**{key: before.get(key) for key in inner.generation_config.to_dict()})


def test_an_answer_ends_at_the_end_token_or_is_unfinished(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> None:
    free = generate_answers(model, tokenizer, questions[:1], decoding(tokenizer), ignore)[0]
    assert not free.finished
    spoken = tokenizer(free.text, add_special_tokens=False)["input_ids"]
    stopped = generate_answers(
        model,
        tokenizer,
        questions[:1],
        decoding(tokenizer, end_tokens=(tokenizer.eos_token_id, spoken[3])),
        ignore,
    )[0]
    assert stopped.finished
    assert free.text.startswith(stopped.text)
    assert len(stopped.text) < len(free.text)


def test_loss_is_transformers_own(model: PeftModel, questions: list[Question]) -> None:
    import torch

    losses = measure_losses(model, questions, ignore)
    for question, loss in zip(questions, losses, strict=True):
        with torch.inference_mode():
            expected = model(
                input_ids=torch.tensor([question.input_ids]), labels=torch.tensor([question.labels])
            ).loss.item()
        assert loss.tokens == question.reference_tokens
        assert loss.nats / loss.tokens == pytest.approx(expected, rel=1e-5)


def test_evaluate_puts_base_beside_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> None:
    said = generate_answers(model, tokenizer, questions, decoding(tokenizer), ignore)
    with model.disable_adapter():
        base_said = generate_answers(model, tokenizer, questions, decoding(tokenizer), ignore)
    assert [answer.text for answer in said] != [answer.text for answer in base_said]
    # The first question has the adapter's own answer as reference: right on it and nowhere else.
    known = make_question(tokenizer, PROMPTS[0], said[0].text)
    stages: list[str] = []
    result = evaluate(
        model,
        tokenizer,
        [known, *questions[1:]],
        decoding(tokenizer),
        subject(len(questions)),
        since={},
        report=lambda stage, done, total: stages.append(f"{stage} {done}/{total}"),
    )
    exact, loss, *_ = result.scores.scores
    assert (exact.metric, exact.rows, exact.base, exact.adapter) == ("exact_match", 5, 0.0, 0.2)
    assert exact.adapter_interval == pytest.approx((0.0362, 0.6245), abs=1e-4)
    assert loss.base != loss.adapter
    assert result.scores.example is not None
    assert (result.scores.example.messages, result.scores.example.answer) == (known.messages, said[0].text)
    assert len(result.failures) == 4
    assert result.failures[0].base_answer == base_said[1].text
    classes = {case.messages[0]["content"]: case.failure_class for case in result.failures}
    assert classes[PROMPTS[2]] == "does_not_stop"
    assert result.scores.decoding["end_tokens"] == ["<|im_end|>"]
    assert {"base: loss 5/5", "base: answers 0/5", "adapter: answers 5/5"} <= set(stages)


@pytest.fixture
def damaged(model: PeftModel) -> Iterator[PeftModel]:
    import torch

    weight = model.get_base_model().model.norm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    yield model
    with torch.no_grad():
        weight.copy_(before)


def test_a_loss_that_is_not_a_number_is_an_error(
    damaged: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> None:
    with pytest.raises(TrainingError, match=r"loss on test\.jsonl, line 1"):
        evaluate(
            damaged, tokenizer, questions, decoding(tokenizer), subject(5), since={}, report=lambda *_: None
        )


def subject(rows: int) -> Subject:
    return Subject(
        adapter_sha256="0" * 64,
        version="0.1.0",
        data=DatasetLock(source="test.jsonl", split="test", rows=rows, sha256="1" * 64),
        limit=None,
        left_out=0,
        tools={},
        hardware=Hardware(device="cpu", name="any", memory_bytes=1),
    )
