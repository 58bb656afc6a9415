"""``plan --data``: what a run over these rows comes to, by the base's own tokenizer, as training has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
CARD = ("--gpu", "48GiB")


@pytest.fixture
def with_long_rows(rows: Path) -> Path:
    """The training rows and two long ones."""
    path = rows / "train.jsonl"
    with path.open("a") as file:
        for words in (30, 200):
            file.write(json.dumps({"prompt": "long " * words, "completion": "no"}) + "\n")
    return path


@pytest.mark.slow
def test_the_figures_are_those_that_training_says(
    run_cli: Run, recipe: Path, tmp_path: Path, tiny_base: Path, with_long_rows: Path
) -> None:
    changes = ("--set", "training.steps=null", "--set", "training.epochs=0.2")
    code, out, _ = run_cli("plan", recipe, *CARD, "--data", with_long_rows, "--json", *changes)
    assert code == 0
    data = json.loads(out)["data"]
    assert (data["examples"], data["longer_than_max_length"]) == (42, 2)
    assert data["tokens"] <= data["packed_rows"] * 96
    code, out, stderr = run_cli("train", recipe, "--out", tmp_path / "out", "--json", *changes)
    assert code == 0, stderr
    assert f"40 examples in {data['packed_rows']} rows of at most 96 tokens" in stderr
    assert (
        f"left out 2 of 42 train rows longer than data.max_length 96; the longest is {data['longest_tokens']}"
        in stderr
    )
    assert json.loads(out)["curve"]["steps"] == data["steps"]


def test_a_reader_sees_them_and_what_a_shorter_context_would_leave_out(
    run_cli: Run, tiny_base: Path, with_long_rows: Path
) -> None:
    arguments = ("plan", tiny_base, "--data", with_long_rows, "--set", "data.max_length=1024")
    code, out, _ = run_cli(*arguments, *CARD)
    assert code == 0
    assert "data: 42 examples, the longest of " in " ".join(out.split())
    assert "optimizer steps of 16 rows" in " ".join(out.split())
    fixed = ("--set", "training.micro_batch=16", "--set", "training.optimizer=adamw")
    code, out, _ = run_cli(*arguments, "--gpu", "844MiB", "--reserve", "1B", *fixed)
    assert code == 6
    # Only the row of 200 words is longer than 256 tokens.
    assert "data.max_length 256 (peak 0.82 GiB; leaves out 1 of 42 examples)" in " ".join(out.split())


def test_without_data_none_is_read(run_cli: Run, recipe: Path, rows: Path) -> None:
    shutil.rmtree(rows)
    code, out, _ = run_cli("plan", recipe, *CARD, "--json")
    assert code == 0
    assert json.loads(out)["data"] is None


def test_a_base_without_a_tokenizer_is_said(
    run_cli: Run, tmp_path: Path, tiny_base: Path, with_long_rows: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_base / "config.json", bare)
    assert run_cli("plan", bare, *CARD)[0] == 0
    code, _, stderr = run_cli("plan", bare, *CARD, "--data", with_long_rows)
    assert code == 3
    assert "no tokenizer" in stderr
