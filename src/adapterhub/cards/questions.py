"""Rows as questions: the prompt a model is given, and the reference its answer is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of tokens that carry no loss, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that the assistant is to go on, ready to be asked."""

    messages: tuple[dict[str, str], ...]
    """``role`` and ``content``."""
    prompt_ids: list[int]
    """The messages through the chat template, generation prompt included. Length P."""
    where: str
    """Where it stands, like ``test.jsonl, line 12``."""

    @property
    def reference_tokens(self) -> int | None:
        """Tokens that a right answer takes, its end token included; None when that is not known."""
        return None


@dataclass(frozen=True)
class Question(Prompt):
    """One held-out row, ready to be asked and scored: the prompt is every message before the last."""

    reference: str
    """The last message's content: what the assistant should answer."""
    input_ids: list[int]
    """The whole conversation as tokens. Length T."""
    labels: list[int]
    """``input_ids`` where the assistant speaks, its end token included; ``IGNORED`` elsewhere. Length T."""

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


def pose_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], where: str) -> Prompt:
    """The prompt in ``messages``. Raises DataError when the chat template refuses them."""
    import jinja2

    try:
        prompt_ids: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
    except jinja2.TemplateError as err:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{where}: the chat template refuses these messages ({roles}): {err}",
            "ask in the roles that the adapter was trained with",
        ) from err
    return Prompt(tuple(messages), list(prompt_ids), where)


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
    prompt = pose_prompt(tokenizer, messages[:-1], where)
    return Question(
        prompt.messages, prompt.prompt_ids, where, messages[-1]["content"], input_ids=input_ids, labels=labels
    )


def answer_budget(questions: Sequence[Question]) -> int:
    """How many tokens an answer may take so that no right one is cut: the longest reference and a margin.

    The margin (an eighth, at least 8 tokens) is for a right answer that is spelled in other, shorter tokens.
    """
    longest = max(question.reference_tokens for question in questions)
    return longest + max(8, longest // 8)
