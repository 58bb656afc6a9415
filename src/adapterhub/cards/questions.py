"""Rows as questions: the prompt a model is given, and the reference its answer is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of tokens that carry no loss, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Question:
    """One held-out row, ready to be asked and scored."""

    messages: tuple[dict[str, str], ...]
    """The prompt: every message before the last, ``role`` and ``content``."""
    reference: str
    """The last message's content: what the assistant should answer."""
    prompt_ids: list[int]
    """The prompt through the chat template, generation prompt included. Length P."""
    input_ids: list[int]
    """The whole conversation as tokens. Length T."""
    labels: list[int]
    """``input_ids`` where the assistant speaks, its end token included; ``IGNORED`` elsewhere. Length T."""
    where: str
    """Where the row stands, like ``test.jsonl, line 12``."""

    @property
    def reference_tokens(self) -> int:
        """Tokens of the reference, its end token included: the last run of labels."""
        count = 0
        for label in reversed(self.labels):
            if label != IGNORED:
                count += 1
            elif count:
                break
        return count

    def fits(self, context: int | None) -> bool:
        """Whether prompt and reference go into ``context`` tokens; None: the model sets no limit."""
        return (
            context is None
            or max(len(self.input_ids), len(self.prompt_ids) + self.reference_tokens) <= context
        )


def pose(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    where: str,
    *,
    input_ids: list[int],
    labels: list[int],
) -> Question:
    """The question in ``messages``, whose last one is the assistant's reference.

    ``input_ids`` and ``labels`` (length T) are the row as it was encoded for training.
    """
    prompt = tuple(messages[:-1])
    prompt_ids: Any = tokenizer.apply_chat_template(
        list(prompt), add_generation_prompt=True, return_dict=False
    )
    return Question(prompt, messages[-1]["content"], list(prompt_ids), input_ids, labels, where)


def answer_budget(questions: Sequence[Question]) -> int:
    """How many tokens an answer may take so that no right one is cut: the longest reference and a margin.

    The margin (an eighth, at least 8 tokens) is for a right answer that is spelled in other, shorter tokens.
    """
    longest = max(question.reference_tokens for question in questions)
    return longest + max(8, longest // 8)
