"""Failure cases: what the adapter got wrong, recorded so that anyone can run it again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from hashlib import sha256
from typing import Any, Literal

from adapterhub.cards.checks import passes, read_check
from adapterhub.cards.generation import Answer
from adapterhub.cards.questions import Question
from adapterhub.cards.scores import is_exact, wilson_interval
from adapterhub.errors import DataError
from adapterhub.packaging.evidence import FailureCase, FailureRate

EMPTY_ANSWER = "empty_answer"
DOES_NOT_STOP = "does_not_stop"
FORMATTING = "formatting"
WRONG_ANSWER = "wrong_answer"
CLASSES = {
    EMPTY_ANSWER: "The adapter answered nothing.",
    DOES_NOT_STOP: "The answer ran into the token limit without an end.",
    FORMATTING: "JSON was expected, and the answer is not JSON.",
    WRONG_ANSWER: "The answer is not the expected one.",
}


def find_failures(
    questions: Sequence[Question],
    adapter: Sequence[Answer],
    base: Sequence[Answer],
    *,
    decoding: dict[str, Any],
    version: str,
    since: Mapping[str, str],
) -> tuple[FailureCase, ...]:
    """Every question that the adapter does not answer exactly, in the rows' order, with the base's answer.

    ``since`` maps the id of a case known before to the version that first failed it; new ones get
    ``version``. The same question with the same reference is one case, however many rows hold it.
    """
    cases: dict[str, FailureCase] = {}
    for question, answer, base_answer in zip(questions, adapter, base, strict=True):
        if is_exact(answer.text, question.reference):
            continue
        expected = {"type": "exact", "value": question.reference.strip()}
        case_id = failure_id(question.messages, expected)
        cases[case_id] = FailureCase(
            id=case_id,
            failure_class=classify(answer, question.reference),
            messages=question.messages,
            decoding=decoding,
            expected=expected,
            observed=answer.text,
            base_answer=base_answer.text,
            base_finished=base_answer.finished,
            since=since.get(case_id, version),
        )
    return tuple(cases.values())


def failure_id(messages: Sequence[Mapping[str, str]], expected: Mapping[str, Any]) -> str:
    """First 12 hex digits of the sha256 of messages and check, as compact JSON with sorted keys, UTF-8."""
    content = {"messages": [dict(message) for message in messages], "expected": dict(expected)}
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()[:12]


def classify(answer: Answer, reference: str) -> str:
    """The class of a wrong answer, one of ``CLASSES``; the first that applies."""
    if not answer.text.strip():
        return EMPTY_ANSWER
    if not answer.finished:
        return DOES_NOT_STOP
    if _is_structured(reference) and not _is_structured(answer.text):
        return FORMATTING
    return WRONG_ANSWER


def count_classes(cases: Sequence[FailureCase]) -> dict[str, int]:
    """How many cases each class has, most frequent first, then by name."""
    counts = Counter(case.failure_class for case in cases)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def add_case(
    cases: Sequence[FailureCase],
    messages: Sequence[dict[str, str]],
    expected: dict[str, Any],
    *,
    adapter: Sequence[Answer],
    base: Answer,
    decoding: dict[str, Any],
    version: str,
    note: str | None,
) -> tuple[FailureCase, ...]:
    """``cases`` and one that a person found, answered once greedily or as often as was sampled.

    Raises DataError when the adapter answers it right each time, or when it is recorded already.
    """
    case_id = failure_id(messages, expected)
    check = read_check(expected, case_id)
    wrong = [one for one in adapter if not passes(check, one.text, case_id, finished=one.finished)]
    if not wrong:
        each = "" if len(adapter) == 1 else f" in all {len(adapter)} samples"
        raise DataError(
            f"the adapter passes this check{each}: it answers {adapter[0].text!r}",
            "nothing to record; tighten the check if that answer is wrong",
        )
    if any(case.id == case_id for case in cases):
        raise DataError(f"case {case_id} is recorded already", "see it with `adapterhub failures list`")
    sampled = decoding["method"] == "sampling"
    case = FailureCase(
        id=case_id,
        failure_class=classify(wrong[0], str(expected.get("value", ""))),
        messages=tuple(messages),
        decoding=decoding,
        expected=expected,
        observed=wrong[0].text,
        base_answer=base.text,
        base_finished=base.finished,
        since=version,
        added=True,
        rate=failure_rate(len(wrong), len(adapter)) if sampled else None,
        note=note,
    )
    return (*cases, case)


def failure_rate(failed: int, samples: int) -> FailureRate:
    """``failed`` of ``samples`` answers, with the 95 % Wilson interval of the share."""
    return FailureRate(failed=failed, samples=samples, interval=wilson_interval(failed, samples))


def keep_others(
    found: Sequence[FailureCase], known: Sequence[FailureCase], kind: Literal["rows", "probes"]
) -> tuple[FailureCase, ...]:
    """What a measurement of ``kind`` found, and the ``known`` cases that it did not ask.

    Those are what a person added and what other kinds of measurements found. A case that both hold stays
    added, with its note.
    """
    added = {case.id: case for case in known if case.added}
    asked = {case.id for case in found}
    others = [case for case in known if case.id not in asked and (case.added or case.found_in != kind)]
    return (*(added.get(case.id, case) for case in found), *others)


def is_regression(case: FailureCase) -> bool:
    """Whether the base answers right what the adapter fails."""
    where = f"failure case {case.id}"
    return passes(read_check(case.expected, where), case.base_answer, where, finished=case.base_finished)


def expected_text(case: FailureCase) -> str:
    """What was expected, to be read: the value of an exact check, any other check as compact JSON."""
    value = case.expected.get("value")
    if case.expected.get("type") == "exact" and isinstance(value, str):
        return value
    return json.dumps(case.expected, ensure_ascii=False, sort_keys=True)


def worst_first(cases: Sequence[FailureCase]) -> list[FailureCase]:
    """Cases that the base gets right first, then by how little the answer is like the expected one."""
    return sorted(cases, key=lambda case: (not is_regression(case), _similarity(case), case.id))


def to_jsonl(cases: Sequence[FailureCase]) -> bytes:
    """failures.jsonl's bytes: one case a line, UTF-8; no bytes at all when nothing failed."""
    return "".join(case.model_dump_json() + "\n" for case in cases).encode()


def _similarity(case: FailureCase) -> float:
    """The share of characters that both texts have in common (difflib's quick_ratio), 0 to 1."""
    return SequenceMatcher(None, expected_text(case), case.observed.strip(), autojunk=False).quick_ratio()


def _is_structured(text: str) -> bool:
    """Whether ``text`` is a JSON object or list."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
