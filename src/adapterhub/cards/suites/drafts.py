"""A probe before it has a name: what generators make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

Message = dict[str, str]
Draw = Callable[[Random], "Draft"]
"""Makes one probe from a source of chance; two draws may give the same."""

SAYS_SOMETHING: dict[str, Any] = {"type": "regex", "pattern": r"\S"}


@dataclass(frozen=True)
class Draft:
    """One question and what a right answer must be."""

    messages: tuple[Message, ...]
    check: dict[str, Any]
    max_new_tokens: int


def ask(question: str, check: dict[str, Any], max_new_tokens: int, system: str | None = None) -> Draft:
    """One turn of the user, after a system message if there is one."""
    before = () if system is None else ({"role": "system", "content": system},)
    return Draft((*before, {"role": "user", "content": question}), check, max_new_tokens)


def choose(rng: Random, question: str, right: str, wrong: str) -> Draft:
    """A choice between A and B, in chance order."""
    is_first = rng.random() < 0.5
    options = (right, wrong) if is_first else (wrong, right)
    text = f"{question}\n(A) {options[0]}\n(B) {options[1]}\nAnswer with A or B only."
    check = {"type": "choice", "answer": "A" if is_first else "B", "options": ["A", "B"]}
    return ask(text, check, SHORT)


def all_of(*checks: dict[str, Any]) -> dict[str, Any]:
    """A check that wants several."""
    return {"type": "all_of", "checks": list(checks)}


SHORT = 24
"""Tokens for a word, a letter or a number, and a sentence around it."""
SENTENCES = 64
"""Tokens for one or two sentences."""
LONG = 128
"""Tokens for a paragraph or a list."""
