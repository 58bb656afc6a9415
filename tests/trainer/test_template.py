"""From messages to tokens: the loss is on exactly what the assistant must say, its end token included."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub import DataError, RecipeError
from adapterhub.trainer.data import read_rows
from adapterhub.trainer.model import load_tokenizer
from adapterhub.trainer.template import IGNORED, encode, end_token_id

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path):
    return load_tokenizer(tiny_base)


def labelled(tokenizer, encoded) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@given(prompt=TEXT, answer=TEXT)
@settings(deadline=None)
def test_the_mask_decodes_to_the_answer_and_its_end_token(tokenizer, prompt: str, answer: str) -> None:
    messages = chat(("system", "Answer."), ("user", prompt), ("assistant", answer))
    encoded = encode(tokenizer, messages)
    assert labelled(tokenizer, encoded) == answer + "<|im_end|>"
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert all(
        label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True)
    )


def test_every_assistant_turn_is_learned(tokenizer) -> None:
    messages = chat(("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2"))
    assert labelled(tokenizer, encode(tokenizer, messages)) == "1<|im_end|>2<|im_end|>"


def test_an_answer_that_repeats_its_prompt_is_found_in_the_right_place(tokenizer) -> None:
    encoded = encode(tokenizer, chat(("user", "echo"), ("assistant", "echo")))
    learned = [index for index, label in enumerate(encoded.labels) if label != IGNORED]
    assert learned == list(range(learned[0], learned[0] + len(learned)))
    assert labelled(tokenizer, encoded) == "echo<|im_end|>"
    assert tokenizer.decode(encoded.input_ids[: learned[0]]).endswith("<|im_start|>assistant\n")


def test_a_pad_token_that_is_the_end_token_hides_no_end_token(tokenizer) -> None:
    assert tokenizer.pad_token == tokenizer.eos_token  # the classic trap
    encoded = encode(tokenizer, chat(("user", "a"), ("assistant", "b")))
    assert encoded.labels[encoded.input_ids.index(tokenizer.eos_token_id, -3)] in (
        IGNORED,
        tokenizer.eos_token_id,
    )
    assert [label for label in encoded.labels if label != IGNORED][-1] == tokenizer.eos_token_id
    assert end_token_id(tokenizer) == tokenizer.eos_token_id


def test_a_template_that_strips_answers_is_followed(tokenizer, tiny_base: Path) -> None:
    stripping = load_tokenizer(tiny_base)
    stripping.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'] | trim"
    )
    assert (
        labelled(stripping, encode(stripping, chat(("user", "a"), ("assistant", " b \n")))) == "b<|im_end|>"
    )


@pytest.mark.parametrize("answer", ["four", "think", "<|im_start|>", "n", "in"])
def test_what_a_template_puts_before_the_answer_is_learned_too(
    tokenizer, tiny_base: Path, answer: str
) -> None:
    """Generation begins before an empty thinking block, so the model must learn to write it."""
    thinking = load_tokenizer(tiny_base)
    block = "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    thinking.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}", block + "{{ message['content'] }}"
    )
    if thinking.chat_template == tokenizer.chat_template:
        thinking.chat_template = tokenizer.chat_template.replace("\n{{ message", "\n" + block + "{{ message")
    encoded = encode(thinking, chat(("user", "two and two"), ("assistant", answer)))
    assert labelled(thinking, encoded) == f"<think>\n\n</think>\n\n{answer}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "error", "problem"),
    [
        (None, RecipeError, "no chat template"),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            DataError,
            "without an end token",
        ),
        ("{{ raise_exception('no system role') }}", DataError, "no system role"),
        (
            "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}",
            DataError,
            "changes the assistant",
        ),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(
    tiny_base: Path, template, error, problem: str
) -> None:
    other = load_tokenizer(tiny_base)
    other.chat_template = template
    with pytest.raises(error, match=problem):
        encode(other, chat(("user", "a"), ("assistant", "b")))


def test_real_instruction_data_is_masked_right(tokenizer, shared_data: Path) -> None:
    for row in read_rows(shared_data / "sft_train_permissive.jsonl")[:300]:
        answers = [message["content"] for message in row.messages if message["role"] == "assistant"]
        expected = "".join(answer + "<|im_end|>" for answer in answers)
        assert labelled(tokenizer, encode(tokenizer, row.messages)) == expected, row.where
