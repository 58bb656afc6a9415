"""merge, requantize, fidelity, retarget and export with references where they take folders."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.packaging.evidence import FIDELITY, FidelityEvidence, read_evidence
from adapterhub.packaging.release import Release

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_every_command_takes_references(
    hub_server, carded_release: Path, tiny_base: Path, tmp_path: Path, run_cli: Run, monkeypatch
) -> None:
    from huggingface_hub import HfApi

    monkeypatch.setenv("HF_TOKEN", hub_server.token)
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    names = (f"{hub_server.user}/{kind}-{uuid.uuid4().hex[:8]}" for kind in ("base", "orders", "merged"))
    base, orders, merged = names
    api = HfApi(hub_server.url, token=hub_server.token)
    api.create_repo(base)
    api.upload_folder(repo_id=base, folder_path=tiny_base)
    text = tmp_path / "text.txt"
    text.write_text("Two apples for Ann, please. " * 4)

    def run(*args: object) -> str:
        code, printed, err = run_cli(*args)
        assert code == 0, err
        return printed

    run("push", carded_release, orders)
    ref, bf16 = f"{orders}@v0.1.0", tmp_path / "bf16"
    run("merge", ref, "--base", base, "--to", "bf16", "--onto", "trained", "--held-out", text, "--out", bf16)
    assert read_evidence(bf16, FIDELITY, FidelityEvidence) is not None
    run("card", bf16)
    run("push", bf16, merged)
    run("requantize", merged, "--to", "int8", "--held-out", text, "--out", tmp_path / "int8")
    parent = Release.open(tmp_path / "int8").manifest.parent
    assert parent is not None
    assert parent.manifest_sha256 == Release.open(bf16).digest
    found = json.loads(run("fidelity", ref, f"{merged}@0.1.0", "--base", base, "--text", text, "--json"))
    assert found["delta_survival"] == pytest.approx(1, abs=0.05)
    run("retarget", ref, "--base", base, "--to", "fp4", "--out", tmp_path / "fp4")
    run("export", ref, "--base", base, "--to", "gguf", "--out", tmp_path / "lora.gguf")
    run("export", merged, "--to", "gguf", "--out", tmp_path / "merged.gguf")
    together = ("--with", f"{orders}=0.5", "--to", "bf16", "--onto", "original", "--out", tmp_path / "two")
    run("merge", carded_release, "--base", base, *together)
    merge = Release.open(tmp_path / "two").manifest.merge
    assert merge is not None
    assert [other.ref for other in merge.others] == ["tiny-orders@0.1.0"]
