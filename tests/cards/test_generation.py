"""Answers to many questions at once are each question's own, whatever the architecture keeps of a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from adapterhub.cards.generation import Decoding, Sampling, draw_samples, generate_answers
from adapterhub.cards.questions import Prompt, pose_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ASKED = [
    "Ann",
    "Two apples",
    "What is the capital of France?",
    "The quick brown fox jumps over the lazy dog",
    "0123",
    "the lazy dog " * 6,
    "Three",
]
LIMITS = [20, 3, 12, 20, 1, 12, 9]

SIZE = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL = {**SIZE, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 24},
    "gemma2": {**SMALL, "head_dim": 16, "sliding_window": 24},  # every other layer slides
    "gpt2": {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "bloom": {"vocab_size": 384, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2},
    "lfm2": {**SMALL, "layer_types": ["conv", "full_attention"] * 2},
}
SLOW = ("bloom", "gemma2", "gpt2", "lfm2")


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def questions(tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    return [pose_prompt(tokenizer, [{"role": "user", "content": text}], text) for text in ASKED]


def make_model(architecture: str) -> PreTrainedModel:
    """Random, in fp32, where what is computed together hardly changes a number."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, pad_token_id=0, bos_token_id=1, eos_token_id=2, **ARCHITECTURES[architecture]
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fixed = ("emb", "wte", "wpe", "lm_head", "norm", "conv", "A_log")
    with torch.no_grad():  # layers that outweigh the embedding: answers that do not repeat one token
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not any(part in name for part in fixed):
                parameter.mul_(12)
    return model


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ARCHITECTURES],
)
def test_each_answer_is_the_one_alone_up_to_its_own_limit(
    architecture: str, tokenizer: PreTrainedTokenizerBase, questions: list[Prompt]
) -> None:
    import torch

    model = make_model(architecture)
    free = []
    for question in questions:
        ids = torch.tensor([question.prompt_ids])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=383,
        )
        free.append(out[0, ids.shape[1] :].tolist())
    end = free[3][6]  # ends some answers early, wherever it comes first
    expected = []
    for tokens, limit in zip(free, LIMITS, strict=True):
        kept = tokens[:limit]
        finished = end in kept
        expected.append((tokenizer.decode(kept[: kept.index(end)] if finished else kept), finished))
    assert {finished for _, finished in expected} == {True, False}
    told: list[tuple[int, int]] = []
    for size in (1, 3, 7):
        decoding = Decoding(20, size, (end,), context=None)
        answers = generate_answers(
            model, tokenizer, questions, decoding, lambda *done: told.append(done), LIMITS
        )
        assert [(answer.text, answer.finished) for answer in answers] == expected, size
        assert told[-1] == (7, 7)
        assert told == sorted(told)
        told.clear()


def test_the_context_cuts_a_row_and_not_its_mates(
    tokenizer: PreTrainedTokenizerBase, questions: list[Prompt]
) -> None:
    model = make_model("llama")
    longest = max(len(question.prompt_ids) for question in questions)
    decoding = Decoding(20, 7, (383,), context=longest + 2)
    cut, whole = (
        generate_answers(model, tokenizer, questions, it, lambda *_: None)
        for it in (decoding, Decoding(20, 7, (383,)))
    )
    for question, short, full in zip(questions, cut, whole, strict=True):
        room = decoding.context - len(question.prompt_ids)
        (alone,) = generate_answers(model, tokenizer, [question], Decoding(room, 1, (383,)), lambda *_: None)
        assert short == (alone if room < 20 else full)
    assert cut != whole


def test_samples_follow_their_seed(tokenizer: PreTrainedTokenizerBase, questions: list[Prompt]) -> None:
    model = make_model("llama")

    def draw(seed: int) -> list[str]:
        decoding = Decoding(8, 4, (2,), sampling=Sampling(1.0, 1.0, seed))
        return [answer.text for answer in draw_samples(model, tokenizer, questions[0], 10, decoding)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert len(set(draw(3))) > 5
