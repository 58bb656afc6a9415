"""--allow-base-mismatch REASON: every command that loads a base takes another one then, and records why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
WHY = ("--allow-base-mismatch", "its last norm\nwas mended")
REASON = "its last norm was mended"


@pytest.fixture
def other(tiny_base: Path, tmp_path: Path) -> Path:
    """The base with another last norm."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def rows(tmp_path: Path, write_jsonl: Callable[[Path, list[dict]], Path]) -> Path:
    said = [{"role": "user", "content": "Two apples"}, {"role": "assistant", "content": "2"}]
    return write_jsonl(tmp_path / "test.jsonl", [{"messages": said}])


def recorded(mismatch: dict) -> bool:
    return (mismatch["reason"], mismatch["folder"]) == (REASON, "other") and (
        "model.safetensors differs" in mismatch["differs"][0]
    )


@pytest.mark.slow
def test_measurements_record_it(tiny_release: Path, other: Path, rows: Path, run_cli: Run) -> None:
    args = ("eval", tiny_release, "--data", rows, "--base", other)
    code, _, err = run_cli(*args)
    assert (code, "--allow-base-mismatch REASON" in err, str(other) in err) == (3, True, True)
    assert run_cli(*args, "--allow-base-mismatch", " ")[0] == 1
    code, out, err = run_cli(*args, *WHY, "--json")
    assert (code, "warning: loaded on another base" in err) == (0, True)
    assert recorded(json.loads(out)["base_mismatch"])
    assert recorded(json.loads((tiny_release / "evidence/scores.json").read_bytes())["base_mismatch"])
    assert run_cli("card", tiny_release)[0] == 0
    card = (tiny_release / "README.md").read_text()
    assert "Measured on another base" in card
    assert f"{REASON}." in card
    replay = ("failures", "run", tiny_release, "--base", other)
    assert run_cli(*replay)[0] == 3
    code, out, _ = run_cli(*replay, *WHY, "--json")
    assert (code, recorded(json.loads(out)["base_mismatch"])) == (0, True)


def test_a_merge_records_it(
    tiny_release: Path, other: Path, rows: Path, tmp_path: Path, run_cli: Run
) -> None:
    merged = tmp_path / "merged"
    args = ("merge", tiny_release, "--to", "bf16", "--onto", "original", "--base", other, "--out", merged)
    assert run_cli(*args)[0] == 3
    code, out, _ = run_cli(*args, *WHY)
    assert (code, f"because: {REASON}" in out) == (0, True)
    assert recorded(json.loads((merged / "adapterhub.json").read_bytes())["merge"]["base_mismatch"])
    compare = ("fidelity", tiny_release, merged, "--text", rows, "--base", other)
    assert run_cli(*compare)[0] == 3
    code, out, err = run_cli(*compare, *WHY, "--json")
    assert code == 0, err
    assert recorded(json.loads(out)["base_mismatch"])
    assert recorded(json.loads((merged / "evidence/fidelity.json").read_bytes())["base_mismatch"])
