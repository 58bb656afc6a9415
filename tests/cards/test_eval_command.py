"""adapterhub eval, from the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.packaging.evidence import FAILURES, SCORES, ScoresEvidence, read_evidence, read_failures
from adapterhub.packaging.manifest import Manifest, Parent
from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]
ROWS = [
    ("Two apples", "2"),
    ("The quick brown fox jumps over the lazy dog", "A fox."),
    ("What is the capital of France?", "Paris"),
]


@pytest.fixture
def data(tmp_path: Path, write_jsonl: Callable[[Path, list[dict]], Path]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in ROWS
    ]
    return write_jsonl(tmp_path / "test.jsonl", rows)


def test_scores_and_failures_are_written_and_shown(
    tiny_release: Path, tiny_base: Path, data: Path, run_cli: RunCli
) -> None:
    code, out, err = run_cli("eval", tiny_release, "--data", data, "--base", tiny_base)
    assert code == 0, err
    release = Release.open(tiny_release)
    release.check_files()
    scores = read_evidence(tiny_release, SCORES, ScoresEvidence)
    assert scores is not None
    assert scores.adapter_sha256 == release.manifest.files["adapter_model.safetensors"].sha256
    assert (scores.data.source, scores.data.rows, scores.left_out, scores.limit) == ("test.jsonl", 3, 0, None)
    exact, loss, perplexity, bits = scores.scores
    assert (exact.rows, exact.base, exact.adapter) == (3, 0.0, 0.0)
    assert (exact.p_value, exact.verdict) == (1.0, "no difference shown")
    assert loss.base != loss.adapter
    assert perplexity.adapter == pytest.approx(math.exp(loss.adapter))
    said = sum(len(answer.encode()) for _, answer in ROWS)
    assert bits.adapter == pytest.approx(loss.adapter * loss.tokens / said / math.log(2))
    assert scores.hardware.memory_bytes > 0
    assert set(scores.tools) >= {"torch", "transformers", "peft", "bitsandbytes", "adapterhub"}
    failures = read_failures(tiny_release)
    assert failures is not None
    assert [case.messages[0]["content"] for case in failures] == [prompt for prompt, _ in ROWS]
    assert {case.since for case in failures} == {"0.1.0"}
    assert "adapter: answers: 3 of 3 rows" in err
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "metric"
    none_right = "0.0 % 0.0 to 56.1 %"
    assert lines[1].split() == f"exact match 3 {none_right} {none_right} no difference shown".split()
    assert lines[-1].startswith("failure cases: 3 (")


def test_a_rerun_gives_the_same_even_where_evidence_was_lost_and_json_is_one_document(
    tiny_release: Path, tiny_base: Path, data: Path, run_cli: RunCli
) -> None:
    options = (
        "--data",
        data,
        "--base",
        tiny_base,
        "--limit",
        2,
        "--batch-size",
        2,
        "--max-new-tokens",
        6,
        "--json",
    )
    code, out, _ = run_cli("eval", tiny_release, *options)
    first = json.loads(out)
    lines = (tiny_release / FAILURES).read_bytes()
    (tiny_release / SCORES).unlink()
    lost, _, err = run_cli("card", tiny_release)
    assert (lost, "scores.json is listed in adapterhub.json but missing" in err) == (4, True)
    assert "measured again by `adapterhub eval`" in err
    again = json.loads(run_cli("eval", tiny_release, *options)[1])
    assert code == 0
    assert (tiny_release / FAILURES).read_bytes() == lines
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["data"]["rows"] == first["limit"] == 2
    assert first["decoding"] == {
        "method": "greedy", "max_new_tokens": 6, "batch_size": 2, "end_tokens": ["<|im_end|>"],
    }  # fmt: skip
    assert first["failures"]["cases"] == 2


def test_an_adapter_that_fails_nothing_leaves_an_empty_file(
    tiny_release: Path, tiny_base: Path, data: Path, tmp_path: Path, run_cli: RunCli,
    write_jsonl: Callable[[Path, list[dict]], Path],
) -> None:  # fmt: skip
    options = ("--base", tiny_base, "--batch-size", 1, "--max-new-tokens", 5)
    run_cli("eval", tiny_release, "--data", data, *options)
    said = read_failures(tiny_release)
    assert said is not None
    # Its own answers as references: now it is right on every row.
    rows = [{"prompt": case.messages[0]["content"], "completion": case.observed} for case in said]
    rows = [row for row in rows if row["completion"].strip()]
    assert rows
    code, out, err = run_cli(
        "eval", tiny_release, "--data", write_jsonl(tmp_path / "own.jsonl", rows), *options
    )
    assert code == 0, err
    assert (tiny_release / FAILURES).read_bytes() == b""
    assert out.splitlines()[-1] == "failure cases: 0"
    scores = read_evidence(tiny_release, SCORES, ScoresEvidence)
    assert scores is not None
    assert scores.example is not None
    assert scores.scores[0].adapter == 1.0


def test_rows_beyond_the_context_are_counted_and_said(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli,
    write_jsonl: Callable[[Path, list[dict]], Path],
) -> None:  # fmt: skip
    long_row = {"prompt": "word " * 600, "completion": "yes"}
    data = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a", "completion": "b"}, long_row])
    code, _, err = run_cli("eval", tiny_release, "--data", data, "--base", tiny_base, "--max-new-tokens", 4)
    assert code == 0, err
    assert "left out 1 of 2 rows that do not fit the context of 512 tokens, like long.jsonl, line 2" in err
    scores = read_evidence(tiny_release, SCORES, ScoresEvidence)
    assert scores is not None
    assert (scores.left_out, scores.data.rows) == (1, 1)

    only_long = write_jsonl(tmp_path / "only.jsonl", [long_row])
    code, _, err = run_cli("eval", tiny_release, "--data", only_long, "--base", tiny_base)
    assert (code, "none of the 1 rows fits the context" in err) == (2, True)


def test_a_signed_release_is_refused_before_anything_is_loaded(
    tiny_release: Path, data: Path, run_cli: RunCli
) -> None:
    (tiny_release / "model.sig").write_bytes(b"{}")
    code, _, err = run_cli("eval", tiny_release, "--data", data, "--base", "no/such/base")
    assert (code, "is signed" in err) == (3, True)
    assert not (tiny_release / SCORES).exists()


def test_a_merged_release_is_refused(
    tiny_release: Path, data: Path, run_cli: RunCli, edit: Callable[..., None]
) -> None:
    edit(tiny_release, kind="merged", parent=Parent(ref="a/b@0.1.0", manifest_sha256="e" * 64))
    code, _, err = run_cli("eval", tiny_release, "--data", data)
    assert (code, "needs an adapter" in err) == (3, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ('{"prompt": "a"\n', "line 1"),
        ('{"prompt": "a"}\n', "line 1"),
        (None, "no such file"),
    ],
)
def test_bad_data_is_named_and_changes_nothing(
    tiny_release: Path, tmp_path: Path, run_cli: RunCli, text: str | None, message: str
) -> None:
    before = Manifest.read(tiny_release)
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    code, out, err = run_cli("eval", tiny_release, "--data", path)
    assert (code, out, message in err) == (2, "", True)
    assert Manifest.read(tiny_release) == before


def test_limits_of_options_are_checked(tiny_release: Path, data: Path, run_cli: RunCli) -> None:
    for option in ("--limit", "--batch-size", "--max-new-tokens"):
        code, _, err = run_cli("eval", tiny_release, "--data", data, option, "0")
        assert (code, option in err) == (2, True)


def test_changed_weights_are_not_measured(
    tiny_release: Path, tiny_base: Path, data: Path, run_cli: RunCli
) -> None:
    """Scores are bound to the weights that the manifest lists."""
    weights = tiny_release / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = run_cli("eval", tiny_release, "--data", data, "--base", tiny_base)
    assert code == 4
    assert "adapter_model.safetensors" in err
    assert not (tiny_release / SCORES).exists()


def test_the_rows_of_training_are_no_held_out_rows(
    tiny_release: Path, tiny_base: Path, data: Path, run_cli: RunCli
) -> None:
    from adapterhub.packaging.manifest import DatasetLock
    from adapterhub.trainer.data import read_rows, rows_digest

    rows = read_rows(data)
    lock = DatasetLock(source="train.jsonl", split="train", rows=len(rows), sha256=rows_digest(rows))
    manifest = Manifest.read(tiny_release).model_copy(update={"datasets": (lock,)})
    (tiny_release / "adapterhub.json").write_bytes(manifest.to_bytes())
    code, _, err = run_cli("eval", tiny_release, "--data", data, "--base", tiny_base)
    assert code == 2
    assert "trained on" in err


def test_nothing_is_written_into_the_hubs_cache(
    tiny_release: Path, tiny_base: Path, data: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    snapshot = tmp_path / "hub" / "models--ann--tiny" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    tiny_release.rename(snapshot)
    for command in (("eval", snapshot, "--data", data, "--base", tiny_base), ("card", snapshot)):
        code, _, err = run_cli(*command)
        assert code == 3
        assert "pull ann/tiny@" in err
