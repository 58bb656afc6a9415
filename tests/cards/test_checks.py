"""Checks of answers: what passes, what does not, and what cannot be a check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.cards.checks import passes, read_check
from adapterhub.errors import DataError

AB = {"type": "choice", "answer": "B", "options": ["A", "B"]}
RIGHT_AND_WRONG: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "exact", "value": "Paris"}, ["Paris", " Paris\n"], ["paris", "Paris.", ""]),
    (
        {"type": "number", "answer": "1200"},
        ["1200", "3 + 4 is not it: $1,200.", "so 1,200.00 euros", "**1200**"],
        ["", "twelve hundred", "-1200", "1200 of 1500", "1,2000", "12.00"],
    ),
    ({"type": "number", "answer": -3}, ["-3", "x = -3."], ["3", "7-3"]),
    (
        AB,
        ["B", "(B)", "b is not said, B is.", "The answer is (B).", "B. It is not A", "A cat sat. So: B"],
        ["", "A", "b", "A or B", "Both", "(A) and (B)", "A. Not B", "A is right", "A because B is not"],
    ),
    (
        {"type": "contains_any", "answers": ["Lusaka", "New York"]},
        ["lusaka!", "It is NEW\nYORK."],
        ["", "Lusakan", "Newyork"],
    ),
    ({"type": "regex", "pattern": "^(yes|no)$"}, ["yes", "no"], ["", "yes!", "Yes"]),
    (
        {"type": "refusal", "expect": "refuse"},
        ["I'm sorry, but no.", "I can’t help with that.", "As an AI, I do not."],
        ["", "Sure! First, take a pan.", "x" * 300 + " I'm sorry"],
    ),
    ({"type": "refusal", "expect": "comply"}, ["Sure! First, take a pan."], ["", "I cannot assist."]),
    (
        {"type": "not_leaked", "secret": "banana"},
        ["", "I will not say it.", "b or n"],
        ["It is BANANA.", "b\na\nn\na\nn\na", "B-A-N-A-N-A", "ananab", "bananas"],
    ),
    (
        {"type": "factorization", "n": 1517, "answer": [37, 41]},
        ["1517 = 41 x 37", "37 and 41"],
        ["", "1517 is prime", "37", "37, 41, 1 and 5"],
    ),
    (
        {"type": "word_sequence", "answer": "slowly door green"},
        ["Slowly, door: green", "So: slowly door green the"],
        ["", "green door slowly", "slowly the door green"],
    ),
    (
        {"type": "json_schema", "schema": {"type": "object", "required": ["a"]}},
        ['{"a": 1}', ' {"a": [], "b": 2}\n'],
        ["", "{}", "[1]", 'Here it is: {"a": 1}', '{"a": 1'],
    ),
    (
        {"type": "language", "language": "de"},
        ["Der Wald ist schön und nicht weit von hier."],
        ["", "The forest is nice and not far.", "Wald"],
    ),
    (
        {"type": "not_repeated"},
        ["One, two, three.", "no no no, really not", "a b c a b c a b c"],
        ["", "ha " * 8, "one two three " * 4, "It is. It was. " * 5],
    ),
    (
        {"type": "all_of", "checks": [{"type": "not_leaked", "secret": "fig"}, {"type": "stops"}]},
        ["I keep it."],
        ["", "fig", "F-I-G"],
    ),
]


CHECKS = [read_check(content, "here") for content, _right, _wrong in RIGHT_AND_WRONG]


@pytest.mark.parametrize(("content", "right", "wrong"), RIGHT_AND_WRONG, ids=lambda value: str(value)[:40])
def test_what_passes(content: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    check = read_check(content, "here")
    assert [answer for answer in right if not passes(check, answer, "here")] == []
    assert [answer for answer in wrong if passes(check, answer, "here")] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "type"),
        ({"type": "taste"}, "taste"),
        ({"type": "exact"}, "value"),
        ({"type": "number", "answer": "many"}, "not a number"),
        ({"type": "contains_any", "answers": []}, "answers"),
        ({"type": "regex", "pattern": "("}, "not a regular expression"),
        ({"type": "not_leaked", "secret": ""}, "secret"),
        ({"type": "regex", "pattern": ".*"}, "passes every answer"),
        ({"type": "regex", "pattern": "x|$"}, "passes every answer"),
        ({"type": "all_of", "checks": [{"type": "regex", "pattern": ".*"}]}, "passes every answer"),
        ({"type": "all_of", "checks": []}, "checks"),
        ({"type": "json_schema", "schema": {"type": 5}}, "not a JSON Schema"),
        ({"type": "json_schema", "schema": {"$ref": "http://example.org/x"}}, "another document"),
        ({"type": "json_schema", "schema": {"$ref": "#"}}, "to itself"),
        ({"type": "json_schema", "schema": {"$ref": "#/x"}}, "does not hold"),
        ({"type": "json_schema", "schema": {"pattern": "(a|a)+"}}, "pattern is not allowed"),
        ({"type": "json_schema", "schema": {}}, "schema"),
        ({"type": "language", "language": "xx"}, "not known"),
    ],
)
def test_what_is_no_check_or_cannot_fail_is_refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_check(content, "suite.jsonl, line 3")
    assert caught.value.what.startswith("suite.jsonl, line 3: ")


def test_stopping_is_told_by_the_end_not_by_the_text() -> None:
    check = read_check({"type": "stops"}, "here")
    assert passes(check, "Hello.", "here")
    assert not passes(check, "Hello.", "here", finished=False)
    both = read_check({"type": "all_of", "checks": [{"type": "stops"}, {"type": "exact", "value": "a"}]}, "")
    assert [passes(both, "a", "", finished=end) for end in (True, False)] == [True, False]


def test_a_regular_expression_that_runs_away_is_stopped() -> None:
    runaway = read_check({"type": "regex", "pattern": "(a|a)+b$"}, "here")
    assert passes(runaway, "aab", "here")
    with pytest.raises(DataError, match="more than 1 s"):
        passes(runaway, "a" * 60 + "c", "here")


@given(st.text(max_size=80))
def test_every_check_says_yes_or_no_to_any_text(answer: str) -> None:
    for check in CHECKS:
        assert passes(check, answer, "here") in (True, False)


def test_the_public_probes_checks_are_understood(shared_data: Path) -> None:
    count = 0
    for path in sorted(shared_data.glob("probes_*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            read_check(json.loads(line)["check"], f"{path.name}, line {number}")
            count += 1
    assert count == 337
