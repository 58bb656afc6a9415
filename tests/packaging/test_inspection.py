"""``adapterhub inspect``: what a folder says of itself, in words and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.errors import ReleaseError
from adapterhub.packaging.evidence import FAILURES, SCORES, to_json
from adapterhub.packaging.files import sha256_file
from adapterhub.packaging.inspection import inspect_folder
from adapterhub.packaging.keys import generate_key
from adapterhub.packaging.merge import merge_adapter
from adapterhub.packaging.release import Release
from adapterhub.packaging.signing import sign_release

RunCli = Callable[..., tuple[int, str, str]]


def add_scores(folder: Path, adapter_sha256: str) -> Release:
    from adapterhub.packaging.evidence import Score, ScoresEvidence
    from adapterhub.packaging.manifest import DatasetLock, Hardware

    scores = ScoresEvidence(
        adapter_sha256=adapter_sha256,
        data=DatasetLock(source="test.jsonl", split="test", rows=60, sha256="1" * 64),
        decoding={"do_sample": False},
        scores=(Score(metric="exact_match", unit="share of rows", rows=60, base=0.05, adapter=0.9),),
        hardware=Hardware(device="cpu", name="a processor", memory_bytes=2**30),
        seconds=3.5,
    )
    return Release.open(folder).with_files({SCORES: to_json(scores), FAILURES: b""})


def test_a_release_tells_what_it_is(tiny_release: Path, run_cli: RunCli) -> None:
    add_scores(tiny_release, sha256_file(tiny_release / "adapter_model.safetensors"))
    code, out, err = run_cli("inspect", tiny_release)
    assert (code, err) == (0, "")
    lines = {line[:12].strip(): line[13:] for line in out.splitlines() if line[:12].strip()}
    assert lines["release"] == "tiny-orders 0.1.0"
    assert lines["rank"] == "4, scale 2"
    assert lines["parameters"].startswith("8,192 in 14 modules")
    assert lines["base in"] == "nf4, blocks of 64, scales quantized, computing in bfloat16"
    assert lines["signature"] == "none"
    assert lines["scores"] == "exact_match: base 0.05, adapter 0.9 (share of rows, 60 rows)"
    assert lines["failures"] == "0 recorded cases"


def test_json_holds_everything(tiny_release: Path, tmp_path: Path, run_cli: RunCli) -> None:
    sign_release(tiny_release, generate_key(tmp_path / "k").private)
    code, out, _err = run_cli("inspect", tiny_release, "--json")
    assert code == 0
    found = json.loads(out)
    release = Release.open(tiny_release)
    assert found["digest"] == release.digest
    listed = json.loads(release.manifest.to_bytes())
    assert found["manifest"] | {"files": listed["files"]} == listed
    assert {file["path"]: file["sha256"] for file in found["files"]} == {
        name: entry.sha256 for name, entry in release.manifest.files.items()
    }
    assert found["signed"] is True
    assert found["scores"] is None
    assert found["adapter"]["targets"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip


def test_a_plain_adapter_says_what_is_not_known(tiny_adapter: Path, run_cli: RunCli) -> None:
    code, out, _err = run_cli("inspect", tiny_adapter)
    assert code == 0
    assert "not known    version, base digest, recipe, data" in out
    assert "named, not bound by a digest" in out
    found = inspect_folder(tiny_adapter)
    assert (found.manifest, found.digest, found.signed) == (None, None, False)
    assert found.parameters == 8192


def test_a_merged_release_names_its_parent_and_counts_its_parameters(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    merge_adapter(tiny_release, tiny_base, tmp_path / "out", onto="trained")
    code, out, _err = run_cli("inspect", tmp_path / "out")
    assert code == 0
    assert "kind         merged, onto trained" in out
    assert "parent       tiny-orders@0.1.0" in out
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert f"parameters   {model.num_parameters():,}" in out


def test_files_that_are_missing_changed_or_strange_are_marked(tiny_release: Path, run_cli: RunCli) -> None:
    (tiny_release / "tokenizer.json").unlink()
    (tiny_release / "tokenizer_config.json").write_text("{}")
    (tiny_release / "modeling.py").write_text("")
    (tiny_release / ".gitattributes").write_text("")
    states = {file.path: file.state for file in inspect_folder(tiny_release).files}
    assert states["tokenizer.json"] == "missing"
    assert states["tokenizer_config.json"] == "other size"
    assert states["modeling.py"] == "not listed"
    assert states["adapter_config.json"] == "as listed"
    assert ".gitattributes" not in states
    out = run_cli("inspect", tiny_release)[1]
    assert "tokenizer.json  missing" in out


def test_scores_of_other_weights_are_said_to_be(tiny_release: Path, run_cli: RunCli) -> None:
    add_scores(tiny_release, "2" * 64)
    assert inspect_folder(tiny_release).scores_are_of_these_weights is False
    assert "of other weights than these" in run_cli("inspect", tiny_release)[1]


def test_a_strangers_words_do_not_reach_the_terminal_raw(tiny_release: Path, run_cli: RunCli) -> None:
    path = tiny_release / "adapterhub.json"
    content = json.loads(path.read_bytes()) | {
        "task": "\x1b[2J\x1b]0;owned\x07 hello\nrelease      fake 9.9.9"
    }
    path.write_text(json.dumps(content))
    out = run_cli("inspect", tiny_release)[1]
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\nrelease      fake" not in out


def test_neither_a_release_nor_an_adapter(tmp_path: Path, run_cli: RunCli) -> None:
    with pytest.raises(ReleaseError, match="holds neither"):
        inspect_folder(tmp_path)
    with pytest.raises(ReleaseError, match="no such folder"):
        inspect_folder(tmp_path / "none")
    code, out, err = run_cli("inspect", tmp_path)
    assert (code, out) == (3, "")
    assert err.startswith("error: ")
