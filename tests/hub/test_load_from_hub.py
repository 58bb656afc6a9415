"""load_adapter with everything on the Hub: adapter and base."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from adapterhub import load_adapter

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_from_the_hub_with_the_base_from_the_hub(
    hub_server,
    tiny_base: Path,
    tmp_path: Path,
    run_cli: Run,
    write_jsonl: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Train on a base of the Hub, push, and load in a clean home: the base comes at its commit, checked."""
    from huggingface_hub import HfApi

    monkeypatch.setenv("HF_TOKEN", hub_server.token)
    name = f"{hub_server.user}/base-{uuid.uuid4().hex[:8]}"
    api = HfApi(hub_server.url, token=hub_server.token)
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=tiny_base)
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"say {n}", "completion": str(n)} for n in range(8)])
    (tmp_path / "recipe.yaml").write_text(
        json.dumps(
            {
                "name": "numbers",
                "base": name,
                "licence": "apache-2.0",
                "data": {"train": "train.jsonl", "max_length": 64},
                "lora": {"rank": 2},
                "training": {"steps": 1, "batch_size": 2},
            }
        )
    )
    out, target = tmp_path / "numbers", f"{hub_server.user}/numbers-{uuid.uuid4().hex[:8]}"
    code, _, stderr = run_cli("train", tmp_path / "recipe.yaml", "--out", out, "--endpoint", hub_server.url)
    assert code == 0, stderr
    manifest = json.loads((out / "adapterhub.json").read_bytes())
    assert manifest["base"]["revision"] == api.model_info(name).sha
    assert run_cli("card", out)[0] == 0
    code, _, stderr = run_cli("push", out, target, "--endpoint", hub_server.url)
    assert code == 0, stderr

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "clean"))
    model, tokenizer = load_adapter(f"{target}@v0.1.0", endpoint=hub_server.url)
    assert type(model).__name__.startswith("Peft")
    assert tokenizer.chat_template

    api.upload_file(repo_id=name, path_or_fileobj=b"{}", path_in_repo="config.json")  # the branch moves on
    load_adapter(target, endpoint=hub_server.url)
