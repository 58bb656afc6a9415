"""adapterhub eval with probes, precisions, benchmarks and training rows, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.packaging.evidence import FAILURES, SCORES, ScoresEvidence, read_evidence, read_failures
from adapterhub.packaging.precisions import PRECISIONS, read_precisions
from adapterhub.packaging.probes import PROBES, read_probes
from adapterhub.packaging.release import Release
from adapterhub.packaging.tasks import TASKS, read_tasks

RunCli = Callable[..., tuple[int, str, str]]
WriteJsonl = Callable[..., Path]
SUITE = [
    {"id": "a", "class": "own", "messages": [{"role": "user", "content": "Two apples"}],
     "check": {"type": "exact", "value": "never"}, "max_new_tokens": 4, "remark": "kept out"},
    {"id": "b", "class": "own", "messages": [{"role": "user", "content": "Three pears"}],
     "check": {"type": "regex", "pattern": r"\S"}, "max_new_tokens": 6},
    {"id": "c", "class": "long", "messages": [{"role": "user", "content": "word " * 600}],
     "check": {"type": "number", "answer": 3}},
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, write_jsonl: WriteJsonl) -> Path:
    rows = [{"prompt": f"{number} apples for Ann", "completion": f"{number}"} for number in range(2, 5)]
    return write_jsonl(tmp_path / "test.jsonl", rows)


def test_probes_become_evidence_failures_and_a_table_of_the_card(
    tiny_release: Path, tiny_base: Path, data: Path, tmp_path: Path, run_cli: RunCli, write_jsonl: WriteJsonl
) -> None:
    suite = write_jsonl(tmp_path / "suite.jsonl", SUITE)
    options = ("--base", tiny_base, "--batch-size", 2)
    code, out, err = run_cli("eval", tiny_release, "--probes", suite, *options)
    assert code == 0, err
    assert "left out 1 of 3 probes, like this one: suite.jsonl, line 3" in err
    assert "adapter: probes: 2 of 2 rows" in err
    assert out.splitlines()[-1] == "failure cases: 1 (own 1)"
    release = Release.open(tiny_release)
    release.check_files()
    probes = read_probes(tiny_release)
    assert probes is not None
    assert probes.adapter_sha256 == release.manifest.files["adapter_model.safetensors"].sha256
    (score,) = probes.scores
    assert (score.probe_class, score.probes, score.adapter_passed, probes.left_out) == ("own", 2, 1, 1)
    assert [outcome.max_new_tokens for outcome in probes.outcomes] == [4, 6]
    assert "max_new_tokens" not in probes.decoding
    (case,) = read_failures(tiny_release) or ()
    assert (case.found_in, case.failure_class, case.decoding["max_new_tokens"]) == ("probes", "own", 4)

    # The rows' cases are added, the probes' stay; both are told apart in the card, and can be asked again.
    assert run_cli("eval", tiny_release, "--data", data, *options, "--max-new-tokens", 4)[0] == 0
    assert [it.found_in for it in read_failures(tiny_release) or ()] == ["rows"] * 3 + ["probes"]
    code, out, err = run_cli("failures", "run", tiny_release, "--base", tiny_base, "--json")
    assert code == 0, err
    assert json.loads(out)["counts"]["still failing"] == 4
    assert run_cli("card", tiny_release)[0] == 0
    readme = (tiny_release / "README.md").read_text()
    assert "| own | 2 |" in readme
    assert "4 recorded cases, 3 from 3 rows, 1 from 2 probes" in readme


def test_an_edited_score_of_probes_is_refused(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli, write_jsonl: WriteJsonl
) -> None:
    suite = write_jsonl(tmp_path / "suite.jsonl", SUITE[:2])
    assert run_cli("eval", tiny_release, "--probes", suite, "--base", tiny_base, "--json")[0] == 0
    edited = json.loads((tiny_release / PROBES).read_text())
    edited["scores"][0]["adapter_passed"] = 2
    release = Release.open(tiny_release)
    (tiny_release / PROBES).write_text(json.dumps(edited))
    code, _, err = run_cli("card", tiny_release)
    assert (code, "is not the file that adapterhub.json lists" in err) == (4, True)
    release.with_files({PROBES: json.dumps(edited).encode()})
    code, _, err = run_cli("card", tiny_release)
    assert (code, "does not follow from the outcomes" in err) == (3, True)


def test_precisions_put_three_sides_on_the_same_rows(
    tiny_release: Path, tiny_base: Path, data: Path, run_cli: RunCli
) -> None:
    options = ("--data", data, "--base", tiny_base, "--max-new-tokens", 3, "--precisions", "--json")
    code, out, err = run_cli("eval", tiny_release, *options)
    assert code == 0, err
    evidence = read_precisions(tiny_release)
    assert evidence is not None
    assert json.loads(out)["precisions"] == evidence.model_dump(mode="json")
    sixteen, quantized, adapter = evidence.sides
    assert sixteen.loss != quantized.loss != adapter.loss
    assert evidence.cost.loss == pytest.approx(quantized.loss - sixteen.loss)
    assert evidence.net.loss == pytest.approx(evidence.cost.loss + evidence.bought.loss)
    scores = read_evidence(tiny_release, SCORES, ScoresEvidence)
    assert scores is not None
    assert scores.scores[1].adapter == adapter.loss
    assert PRECISIONS in Release.open(tiny_release).manifest.files


def test_rows_that_were_trained_on_are_reported(
    tiny_release: Path, tiny_base: Path, data: Path, tmp_path: Path, run_cli: RunCli, write_jsonl: WriteJsonl
) -> None:
    train = write_jsonl(
        tmp_path / "train.jsonl",
        [{"prompt": "2 apples for Ann", "completion": "two"}, {"prompt": "x", "completion": "y"}],
    )
    options = ("--data", data, "--base", tiny_base, "--max-new-tokens", 2)
    code, out, err = run_cli("eval", tiny_release, *options, "--train", train)
    assert code == 0, err
    assert "contamination: 1 of these rows have the prompt of a training row, 0 share 13 words" in out
    scores = read_evidence(tiny_release, SCORES, ScoresEvidence)
    assert scores is not None
    assert scores.contamination is not None
    assert (scores.contamination.is_trained_on, scores.contamination.train_rows) == (False, 2)
    assert scores.contamination.examples == ("test.jsonl, line 1",)
    assert run_cli("card", tiny_release)[0] == 0
    assert "1 of the scored rows has the prompt of a training row" in (tiny_release / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 2, "say what to measure"),
        (("--precisions", "--probes", "math"), 2, "--precisions needs rows"),
        (("--probes", "telepathy"), 2, "no class of probes"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(
    tiny_release: Path, run_cli: RunCli, options: tuple[str, ...], code: int, words: str
) -> None:
    got, out, err = run_cli("eval", tiny_release, *options, "--base", "no/such/base")
    assert (got, out) == (code, "")
    assert words in err
    assert not (tiny_release / FAILURES).exists()


@pytest.mark.slow
def test_a_local_task_runs_through_lm_eval_without_a_network(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli, write_jsonl: WriteJsonl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    text = "the quick brown fox jumps over the lazy dog while two apples fall down"
    rows = [{"q": f"{number} {text}", "choices": ["yes", "no"], "gold": number % 2} for number in range(6)]
    questions = write_jsonl(tmp_path / "questions.jsonl", rows)
    task = tmp_path / "apples.yaml"
    task.write_text(
        f"""
task: apples
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""
    )
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": text, "completion": "y"}])
    options = ("--tasks", task, "--base", tiny_base, "--limit", 4, "--train", train, "--json")
    code, out, err = run_cli("eval", tiny_release, *options)
    assert code == 0, err
    tasks = read_tasks(tiny_release)
    assert tasks is not None
    assert json.loads(out)["files"] == [TASKS]
    (score,) = tasks.scores
    assert (score.task, score.metric, score.questions, score.version) == ("apples", "acc", 4, "2.0")
    assert len(score.task_hash) == 64
    assert score.contaminated == 4
    assert score.verdict == "no difference shown"
    assert score.base_interval is not None
    assert score.base_interval[0] <= score.base <= score.base_interval[1]
    assert run_cli("card", tiny_release)[0] == 0
    assert "apples (version 2.0, 0 examples)" in (tiny_release / "README.md").read_text()

    code, _, err = run_cli("eval", tiny_release, "--tasks", "no_such_task", "--base", tiny_base)
    assert (code, "knows no task 'no_such_task'" in err) == (2, True)
    task.write_text("task: [")
    code, _, err = run_cli("eval", tiny_release, "--tasks", task, "--base", tiny_base)
    assert (code, "lm-eval cannot run" in err) == (2, True)


@pytest.mark.parametrize(
    "words",
    [
        ("RELEASE", "--probes", "math", "absent-1", "absent-2", "--seed", 1),
        ("--probes", "math", "RELEASE", "absent-1", "absent-2"),
        ("--seed", 1, "--probes=math", "RELEASE", "--probes", "absent-1,absent-2"),
        ("RELEASE", "--json", "--probes", "absent-1", "--probes", "absent-2"),
    ],
)
def test_an_option_takes_several_values_in_a_row(
    tiny_release: Path, words: tuple[object, ...], run_cli: RunCli
) -> None:
    code, _, err = run_cli("eval", *(tiny_release if word == "RELEASE" else word for word in words))
    assert code != 0
    assert "absent-1" in err


def test_a_word_after_an_option_of_one_value_is_none_of_it(tiny_release: Path, run_cli: RunCli) -> None:
    code, _, err = run_cli("eval", tiny_release, "--data", "a.jsonl", "b.jsonl")
    assert (code, "b.jsonl" in err) == (2, True)
