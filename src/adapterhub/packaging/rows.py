"""One row of training or evaluation data: its three forms, and the one form that they are brought to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

ROLES = ("system", "user", "assistant")
_CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def to_messages(content: Any) -> tuple[dict[str, str], ...]:
    """One row's messages, whatever form it has. Raises ValueError saying what is wrong with it."""
    if not isinstance(content, dict):
        raise ValueError(f"an object is needed, this is {kind(content)}")
    if "messages" in content:
        return _check_messages(content["messages"])
    if "prompt" in content and "completion" in content:
        prompt, completion = content["prompt"], content["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):  # the conversational form of the pair
            return _check_messages(prompt + completion)
        return _pair(_text(content, "prompt"), _text(content, "completion"))
    if "instruction" in content and "output" in content:
        extra = _text(content, "input") if content.get("input") is not None else ""
        prompt = _text(content, "instruction") + (f"\n\n{extra}" if extra.strip() else "")
        return _pair(prompt, _text(content, "output"))
    found = ", ".join(list(content)[:6]) or "no keys"
    raise ValueError(f"neither messages, nor prompt and completion, nor instruction and output ({found})")


def canonical(content: Any) -> bytes:
    """A JSON value as the bytes that digests are made of: compact, sorted keys, UTF-8, a newline after it.

    Raises ValueError for NaN and infinite numbers, which JSON has not.
    """
    return _CANONICAL.encode(content).encode() + b"\n"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names: Sequence[tuple[type, str]] = (
        (dict, "an object"),
        (list, "a list"),
        (str, "text"),
        (bool, "true or false"),
    )
    return next(
        (name for kind, name in names if isinstance(value, kind)), "null" if value is None else "a number"
    )


def _check_messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"messages[{index}] must be an object with a role and a content of text")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"messages[{index}].role is {role!r}; known are {', '.join(ROLES)}")
        _check_unicode(message["content"], f"messages[{index}].content")
        if role == "assistant" and not message["content"].strip():
            raise ValueError(f"messages[{index}]: the assistant says nothing")
        checked.append({"role": role, "content": message["content"]})
    if checked[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {checked[-1]['role']}'s; the assistant must answer")
    if all(message["role"] == "assistant" for message in checked):
        raise ValueError("there is no prompt before the assistant's answer")
    return tuple(checked)


def _pair(prompt: str, completion: str) -> tuple[dict[str, str], ...]:
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if not completion.strip():
        raise ValueError("the answer is empty")
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})


def _text(content: dict[str, Any], key: str) -> str:
    value = content[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, this is {kind(value)}")
    _check_unicode(value, key)
    return value


def _check_unicode(text: str, key: str) -> None:
    """JSON can spell half a surrogate pair, which is no character and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise ValueError(f"{key} holds half a surrogate pair at character {err.start + 1}") from err
