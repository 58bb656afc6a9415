"""adapterhub failures, from the command line: recorded cases listed, asked again, and added."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.cards.failures import failure_id, to_jsonl
from adapterhub.packaging.evidence import FAILURES, FailureCase, read_failures
from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]
DECODING = {"method": "greedy", "max_new_tokens": 6, "batch_size": 2, "end_tokens": ["<|im_end|>"]}


def make_case(prompt: str, expected: dict, **changes: object) -> FailureCase:
    messages = ({"role": "user", "content": prompt},)
    case = FailureCase(
        id=failure_id(messages, expected),
        failure_class="wrong_answer",
        messages=messages,
        decoding=DECODING,
        expected=expected,
        observed="as it was",
        base_answer="as the base was",
        since="0.0.9",
    )
    return case.model_copy(update=changes)


WRONG = make_case("Two apples", {"type": "exact", "value": "never said"})
FIXED = make_case("Three pears", {"type": "regex", "pattern": "^[^\x00]{2,}$"})


def record(release: Path, *cases: FailureCase) -> None:
    Release.open(release).with_files({FAILURES: to_jsonl(cases)})


def test_cases_are_listed(tiny_release: Path, run_cli: RunCli) -> None:
    record(tiny_release, WRONG, FIXED)
    code, out, err = run_cli("failures", "list", tiny_release)
    assert code == 0, err
    assert out.splitlines()[0] == f"{WRONG.id}  wrong_answer  since 0.0.9  Two apples"
    assert "failure cases: 2 (wrong_answer 2)" in err
    listed = json.loads(run_cli("failures", "list", tiny_release, "--json")[1])
    assert [case["id"] for case in listed] == [WRONG.id, FIXED.id]


@pytest.mark.slow
def test_a_replay_says_what_still_fails_what_is_fixed_and_what_is_new(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    record(tiny_release, WRONG)
    before = tmp_path / "before.jsonl"
    before.write_bytes(to_jsonl([FIXED]))
    files = {path: path.read_bytes() for path in tiny_release.rglob("*") if path.is_file()}

    options = ("failures", "run", tiny_release, "--base", tiny_base, "--json")
    code, out, err = run_cli(*options)
    assert code == 0, err
    assert json.loads(out)["counts"] == {"still failing": 1, "fixed": 0, "new": 0, "flaky": 0}
    compared = json.loads(run_cli(*options, "--cases", before)[1])
    assert [(case["id"], case["status"]) for case in compared["cases"]] == [
        (FIXED.id, "fixed"),
        (WRONG.id, "new"),
    ]
    assert compared["cases"][0]["answer"] == compared["cases"][0]["answer_alone"] != ""
    again = json.loads(run_cli(*options, "--cases", before)[1])
    assert again == compared
    assert {path: path.read_bytes() for path in tiny_release.rglob("*") if path.is_file()} == files


def test_the_base_alone_answers_otherwise_and_so_does_a_merged_release(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    record(tiny_release, WRONG)
    options = ("failures", "run", tiny_release, "--base", tiny_base, "--json")
    adapter, base = (
        json.loads(run_cli(*options, "--side", side)[1])["cases"][0]["answer"] for side in ("adapter", "base")
    )
    assert adapter != base
    merged = tmp_path / "merged"
    made = ("merge", tiny_release, "--to", "bf16", "--onto", "original", "--base", tiny_base, "--out", merged)
    assert run_cli(*made)[0] == 0
    code, out, err = run_cli("failures", "run", merged, "--cases", tiny_release, "--json")
    assert code == 0, err
    assert json.loads(out)["counts"]["still failing"] == 1
    code, _, err = run_cli("failures", "run", merged, "--cases", tiny_release, "--side", "base")
    assert (code, "its base is not inside it" in err) == (3, True)


def test_a_case_that_passes_only_beside_others_is_flaky(
    tiny_release: Path, tiny_base: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding that depends on the batch cannot be asked for: the answers alone are changed instead."""
    from adapterhub.cards import replay
    from adapterhub.cards.generation import Answer

    real = replay.generate_answers

    def change_alone(model: object, tokenizer: object, asked: list, decoding: object, report: object) -> list:
        answers = real(model, tokenizer, asked, decoding, report)
        return [Answer("", True) for _ in answers] if decoding.batch_size == 1 else answers

    monkeypatch.setattr(replay, "generate_answers", change_alone)
    record(tiny_release, FIXED, WRONG)
    code, out, err = run_cli("failures", "run", tiny_release, "--base", tiny_base)
    assert code == 0, err
    assert out.splitlines()[0].split("  ")[1] == "flaky"
    assert out.splitlines()[-1] == "still failing: 1, fixed: 0, new: 0, flaky: 1"


def test_an_added_case_is_recorded_once_and_kept_by_eval(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli, write_jsonl: Callable[..., Path]
) -> None:
    add = (
        "failures",
        "add",
        tiny_release,
        "--base",
        tiny_base,
        "--max-new-tokens",
        4,
        "--prompt",
        "Say hello",
    )
    code, out, err = run_cli(*add, "--expect", "hello", "--note", "It greets nobody.")
    assert code == 0, err
    (case,) = read_failures(tiny_release) or ()
    assert (case.id, case.added, case.note, case.since) == (out.strip(), True, "It greets nobody.", "0.1.0")
    assert case.decoding["max_new_tokens"] == 4
    Release.open(tiny_release).check_files()
    code, _, err = run_cli(*add, "--expect", "hello")
    assert (code, f"case {case.id} is recorded already" in err) == (2, True)

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    data = write_jsonl(tmp_path / "test.jsonl", rows)
    code, out, err = run_cli("eval", tiny_release, "--data", data, "--base", tiny_base, "--max-new-tokens", 4)
    assert code == 0, err
    assert out.splitlines()[-1].startswith("failure cases: 2 (")
    assert [kept.added for kept in read_failures(tiny_release) or ()] == [False, True]
    assert run_cli("card", tiny_release)[0] == 0
    card = (tiny_release / "README.md").read_text()
    assert "2 recorded cases, 1 from 1 rows, 1 added by hand" in card
    assert "It greets nobody." in card
    assert "adapterhub failures run ./tiny-orders --base ./tiny-llama" in card


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--expect TEXT or with --check JSON"),
        (("--expect", "a", "--check", "{}"), "--expect TEXT or with --check JSON"),
        (("--check", "{"), "--check is not JSON"),
        (("--check", "[]"), "--check is no JSON object"),
        (("--check", '{"type": "regex", "pattern": ""}'), "--check: check"),
        (("--check", '{"type": "regex", "pattern": ".*"}'), "passes every answer"),
        (("--expect", "\udc80"), "is not UTF-8 text"),
        (("--check", '{"type": "not_leaked", "secret": "banana"}'), "the adapter passes this check"),
    ],
)
def test_what_cannot_be_added_is_said(
    tiny_release: Path, tiny_base: Path, run_cli: RunCli, options: tuple[str, ...], words: str
) -> None:
    add = ("failures", "add", tiny_release, "--base", tiny_base, "--max-new-tokens", 4, "--prompt", "Hello")
    code, out, err = run_cli(*add, *options)
    assert (code, out) == (2, "")
    assert words in err
    assert not (tiny_release / FAILURES).exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoding": {"method": "greedy"}}, "decoding: max_new_tokens"),
        ({"decoding": {**DECODING, "method": "sampling"}}, "decoding: temperature"),
        ({"decoding": {**DECODING, "method": "beam"}}, "decoding: method"),
        ({"expected": {"type": "taste"}}, "taste"),
        ({"messages": ({"role": "user", "content": "word " * 600},)}, "context is 512"),
    ],
)
def test_a_case_that_cannot_be_asked_again_is_named(
    tiny_release: Path, tiny_base: Path, run_cli: RunCli, changes: dict, words: str
) -> None:
    record(tiny_release, WRONG.model_copy(update=changes))
    code, out, err = run_cli("failures", "run", tiny_release, "--base", tiny_base)
    assert (code, out) == (2, "")
    assert f"failure case {WRONG.id}" in err
    assert words in err


def test_a_release_that_was_not_measured_says_so(tiny_release: Path, run_cli: RunCli, tmp_path: Path) -> None:
    for command in ("list", "run"):
        code, _, err = run_cli("failures", command, tiny_release)
        assert (code, "records no failure cases: it was not measured" in err) == (3, True)
    broken = tmp_path / "cases.jsonl"
    broken.write_text("{}\n")
    code, _, err = run_cli("failures", "run", tiny_release, "--cases", broken)
    assert (code, "cases.jsonl, line 1" in err) == (3, True)


def test_samples_give_a_rate_with_its_interval_and_the_same_again(
    tiny_release: Path, tiny_base: Path, run_cli: RunCli
) -> None:
    add = ("failures", "add", tiny_release, "--base", tiny_base, "--max-new-tokens", 3, "--samples", 5)
    check = '{"type": "regex", "pattern": "[a-m]$"}'
    code, out, err = run_cli(*add, "--temperature", 2, "--seed", 7, "--prompt", "Say hello", "--check", check)
    assert code == 0, err
    (case,) = read_failures(tiny_release) or ()
    assert case.rate is not None
    assert 0 < case.rate.failed <= case.rate.samples == 5
    assert case.rate.interval[0] < case.rate.failed / 5 <= case.rate.interval[1]
    assert (case.decoding["method"], case.decoding["seed"], case.decoding["temperature"]) == (
        "sampling",
        7,
        2,
    )
    assert f"fails {case.rate.failed} of 5" in err

    code, out, err = run_cli("failures", "run", tiny_release, "--base", tiny_base, "--json")
    assert code == 0, err
    (again,) = json.loads(out)["cases"]
    assert again["rate"] == case.rate.model_dump(mode="json")
    assert again["answer"] == case.observed
    assert again["status"] == ("still failing" if case.rate.failed == 5 else "flaky")


def test_cases_are_asked_of_a_plain_base_model_too(
    tiny_release: Path, tiny_base: Path, run_cli: RunCli
) -> None:
    record(tiny_release, WRONG)
    code, out, err = run_cli("failures", "run", tiny_base, "--cases", tiny_release, "--samples", 2)
    assert code == 0, err
    assert out.splitlines()[0].startswith(f"{WRONG.id}  still failing  fails 2 of 2 (")
    code, _, err = run_cli("failures", "run", tiny_base)
    assert (code, "records no cases" in err) == (3, True)


@pytest.mark.slow
def test_mining_records_new_cases_of_each_class_and_eval_keeps_them(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli, write_jsonl: Callable[..., Path]
) -> None:
    suite = write_jsonl(
        tmp_path / "suite.jsonl",
        [
            {
                "id": f"p{number}",
                "class": "counting" if number % 2 else "naming",
                "messages": [{"role": "user", "content": f"How many are {number} and one?"}],
                "check": {"type": "exact", "value": str(number + 1)},
                "max_new_tokens": 4,
            }
            for number in range(6)
        ],
    )
    mine = ("failures", "mine", tiny_release, "--probes", suite, "--base", tiny_base, "--each", 1, "--json")
    code, out, err = run_cli(*mine)
    assert code == 0, err
    assert "6 of what was asked fails; 2 new cases are recorded" in err
    first = json.loads(out)
    assert {case["failure_class"] for case in first} == {"counting", "naming"}
    assert {case["found_in"] for case in first} == {"mining"}
    more = json.loads(run_cli(*mine)[1])
    assert not {case["id"] for case in first} & {case["id"] for case in more}
    kept = {case.id for case in read_failures(tiny_release) or ()}
    assert kept == {case["id"] for case in [*first, *more]}

    data = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a", "completion": "b"}])
    run_cli("eval", tiny_release, "--data", data, "--base", tiny_base, "--max-new-tokens", 3)
    assert kept < {case.id for case in read_failures(tiny_release) or ()}
