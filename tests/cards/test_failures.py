"""Failure cases: their identity, class and order."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from adapterhub.cards.failures import (
    classify,
    count_classes,
    failure_id,
    find_failures,
    is_regression,
    to_jsonl,
    worst_first,
)
from adapterhub.cards.generation import Answer
from adapterhub.cards.questions import Question
from adapterhub.packaging.evidence import FAILURES, FailureCase, read_failures


def question(prompt: str, reference: str) -> Question:
    return Question(
        ({"role": "user", "content": prompt},), [1], "test.jsonl, line 1", reference, [1, 2], [-100, 2]
    )


def find(
    questions: list[Question], adapter: list[str], base: list[str], **since: str
) -> tuple[FailureCase, ...]:
    as_answers = [[Answer(text, finished=True) for text in side] for side in (adapter, base)]
    return find_failures(questions, *as_answers, decoding={"method": "greedy"}, version="0.2.0", since=since)


def test_only_what_the_adapter_fails_is_recorded_with_the_bases_answer() -> None:
    cases = find([question("a", "1"), question("b", "2")], ["1", "3"], ["0", "2"])
    assert [(case.messages[0]["content"], case.observed, case.base_answer) for case in cases] == [
        ("b", "3", "2")
    ]
    assert cases[0].expected == {"type": "exact", "value": "2"}
    assert is_regression(cases[0])


def test_the_id_is_a_digest_that_other_tools_can_compute() -> None:
    (case,) = find([question("žluťoučký", "1")], ["2"], ["3"])
    text = '{"expected":{"type":"exact","value":"1"},"messages":[{"content":"žluťoučký","role":"user"}]}'
    printed = subprocess.run(
        ["sha256sum"], input=text.encode(), capture_output=True, check=True
    ).stdout.decode()
    assert case.id == printed[:12]
    assert case.id == failure_id([{"content": "žluťoučký", "role": "user"}], {"value": "1", "type": "exact"})


def test_since_is_kept_for_a_case_known_before() -> None:
    questions = [question("a", "1"), question("b", "2")]
    first = find(questions, ["x", "x"], ["y", "y"])
    again = find(questions, ["x", "x"], ["y", "y"], **{first[0].id: "0.1.0"})
    assert [case.since for case in again] == ["0.1.0", "0.2.0"]


def test_a_row_that_stands_twice_is_one_case() -> None:
    assert len(find([question("a", "1")] * 2, ["2", "2"], ["3", "3"])) == 1


@pytest.mark.parametrize(
    ("text", "finished", "reference", "expected"),
    [
        (" \n", False, "1", "empty_answer"),
        ('{"a": 1} {"a": 1} {"a"', False, '{"a": 1}', "does_not_stop"),
        ("Sure! Here it is", True, '{"a": 1}', "formatting"),
        ("[" * 100_000, True, '{"a": 1}', "formatting"),
        ('{"a": 2}', True, '{"a": 1}', "wrong_answer"),
        ("Lyon", True, "Paris", "wrong_answer"),
    ],
)
def test_classes(text: str, finished: bool, reference: str, expected: str) -> None:
    assert classify(Answer(text, finished), reference) == expected


def test_worst_first_puts_regressions_then_the_least_alike() -> None:
    cases = find(
        [question("a", "abcdef"), question("b", "abcdef "), question("c", "abcdef  ")],
        ["abcdex", "zzzzzz", "abcdez"],
        ["no", "no", "abcdef"],
    )
    assert [case.messages[0]["content"] for case in worst_first(cases)] == ["c", "b", "a"]


def test_counts_and_lines() -> None:
    cases = find(
        [question("a", "1"), question("b", "2"), question("c", "3")], ["", "x\ny", "z"], ["", "", ""]
    )
    assert count_classes(cases) == {"wrong_answer": 2, "empty_answer": 1}
    lines = to_jsonl(cases).decode().splitlines()
    assert [json.loads(line)["observed"] for line in lines] == ["", "x\ny", "z"]
    assert to_jsonl(()) == b""


def test_cases_read_back_whatever_the_answer_holds(tmp_path: Path) -> None:
    cases = find([question("a", "1")], ["line\u2028separator \x85 \x0b \r\n end"], ["\x00"])
    (tmp_path / "evidence").mkdir()
    (tmp_path / FAILURES).write_bytes(to_jsonl(cases))
    assert read_failures(tmp_path) == cases
