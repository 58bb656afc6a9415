"""From a conversation to tokens by the tokenizer's own chat template; loss on the assistant's tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that torch's cross-entropy leaves out."""


_MARK = "\ue000assistant\ue001"  # stands for an answer to find its place; private use, so in no template


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens."""

    input_ids: list[int]
    """Token ids, length T."""
    labels: list[int]
    """``input_ids`` where the assistant speaks, its end token included; ``IGNORED`` elsewhere. Length T."""


@dataclass(frozen=True)
class _Span:
    """Characters of the rendered text that the assistant must produce."""

    start: int
    end: int


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> Encoded:
    """Render ``messages`` with the chat template and mask everything but the assistant's text and end tokens.

    The prompt is tokenized apart from the answer, as it is at inference, where the model continues the
    prompt's tokens. What carries loss is then decoded again and must be exactly the assistant's text with its
    end token: a template or tokenizer that cannot give that raises DataError rather than train on something
    else.
    """
    text = render(tokenizer, messages)
    spans = [_assistant_span(tokenizer, messages, turn, text) for turn in _assistant_turns(messages)]
    for tokenize in (_by_segments, _by_offsets):
        encoded = tokenize(tokenizer, text, spans)
        if encoded is not None and _labelled_text(tokenizer, encoded) == [
            text[s.start : s.end] for s in spans
        ]:
            return encoded
    raise DataError(
        f"this tokenizer cannot separate the assistant's text from its prompt: {text[:80]!r}…",
        "use a base whose fast tokenizer splits at its chat template's special tokens",
    )


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The chat template's text for ``messages``.

    Raises RecipeError when the tokenizer has no chat template, DataError when the template refuses the
    messages.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise RecipeError(
            "the base's tokenizer has no chat template, so prompt and answer have no agreed form",
            "choose the instruct version of the base, or put a chat_template.jinja into its folder",
        )
    try:
        text: Any = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateSyntaxError as err:
        raise RecipeError(
            f"the base's chat template is broken: {err}", "mend chat_template.jinja in the base's folder"
        ) from err
    except jinja2.TemplateError as err:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template refuses these messages ({roles}): {err}", "change the rows' roles"
        ) from err
    return str(text)


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends an assistant's turn in this template: what generation must stop at."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoded = encode(tokenizer, messages)
    return [label for label in encoded.labels if label != IGNORED][-1]


def _assistant_turns(messages: Sequence[dict[str, str]]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _assistant_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], turn: int, text: str
) -> _Span:
    """Where turn ``turn`` speaks in ``text``: from the end of its generation prompt through its end token.

    What a template writes between the two (an empty thinking block, say) is the assistant's to say:
    generation begins before it.
    """
    prompt = render(tokenizer, messages[:turn], add_generation_prompt=True)
    if not text.startswith(prompt):
        raise DataError(
            f"the chat template renders message {turn + 1} differently once later ones follow",
            "train on single answers: one assistant message a row",
        )
    marked = [*messages[:turn], messages[turn] | {"content": _MARK}, *messages[turn + 1 :]]
    at = render(tokenizer, marked).find(_MARK, len(prompt))
    content = messages[turn]["content"]
    if not text.startswith(content, at):  # many templates strip the content
        content = content.strip()
    if at < 0 or not text.startswith(content, at):
        raise DataError(
            f"the chat template changes the assistant's text: {content[:60]!r}", "change that text"
        )
    end = at + len(content)
    specials = sorted(
        {str(token) for token in tokenizer.get_added_vocab()} | {str(tokenizer.eos_token)}, key=len
    )
    following = [(text.find(special, end), special) for special in specials if text.find(special, end) >= 0]
    if not following:
        raise DataError(
            "the chat template ends the assistant's turn without an end token: none would learn to stop",
            "use a template that writes one, like the base's eos_token",
        )
    at, special = min(following, key=lambda found: (found[0], -len(found[1])))
    if text[end:at].strip():
        raise DataError(
            f"the chat template writes {text[end:at]!r} after the assistant's text", "use another template"
        )
    return _Span(len(prompt), at + len(special))


def _by_segments(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[_Span]) -> Encoded | None:
    """Tokenize prompt and answers apart; None when the tokens then no longer spell ``text``."""
    ids: list[int] = []
    labels: list[int] = []
    at = 0
    for span in [*spans, _Span(len(text), len(text))]:
        between = tokenizer(text[at : span.start], add_special_tokens=False)["input_ids"]
        answer = tokenizer(text[span.start : span.end], add_special_tokens=False)["input_ids"]
        ids += between + answer
        labels += [IGNORED] * len(between) + answer
        at = span.end
    return Encoded(ids, labels) if _decode(tokenizer, ids) == text else None


def _by_offsets(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[_Span]) -> Encoded | None:
    """Tokenize the text whole, label tokens that begin inside a span; None for tokenizers without offsets."""
    if not tokenizer.is_fast:
        return None
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(span.start <= start < span.end for span in spans) else IGNORED
        for token, (start, _end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
    return Encoded(tokens["input_ids"], labels)


def _labelled_text(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """What each run of labelled tokens decodes to."""
    runs: list[list[int]] = []
    previous = IGNORED
    for label in encoded.labels:
        if label != IGNORED:
            if previous == IGNORED:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [_decode(tokenizer, run) for run in runs]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
