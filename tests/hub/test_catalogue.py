"""list, search, info, repo move and untag: what a Hub holds, and keeping house there."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
from huggingface_hub import HfApi

from adapterhub.hub.push import Delivery, push
from adapterhub.packaging.keys import generate_key
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.release import Release, new_release
from adapterhub.packaging.signing import sign_release

CARD = """---
base_model: tiny/llama-{number}
base_model_relation: adapter
license: apache-2.0
pipeline_tag: text-generation
tags: [adapterhub]
---
# A card
"""


def make(path: Path, version: str, readme: str) -> Release:
    """An adapter release whose weights nobody opens."""
    draft = Manifest(name="orders", version=version, created=datetime(2026, 1, 2, tzinfo=UTC), kind="adapter")
    with new_release(path, draft) as staging:
        (staging / "README.md").write_text(readme)
        (staging / "adapter_config.json").write_text("{}")
        (staging / "adapter_model.safetensors").write_bytes(bytes(3000))
    return Release.open(path)


@pytest.fixture
def shelf(hub_server, tmp_path: Path, monkeypatch) -> str:
    """Three repositories of an owner: one with two versions, a private one, and one that is no release."""
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", hub_server.token)
    mark = f"shelf-{uuid4().hex[:8]}"
    card = CARD.format(number=mark)
    push(make(tmp_path / "1.0.0", "1.0.0", card), f"ada/{mark}-orders")
    newest = make(tmp_path / "1.1.0", "1.1.0", card + "More.")
    push(newest, f"ada/{mark}-orders")
    push(newest, f"ada/{mark}-hidden", delivery=Delivery(private=True))
    HfApi(endpoint=hub_server.url, token=hub_server.token).create_repo(f"ada/{mark}-plain")
    return mark


def rows_of(out: str, mark: str) -> dict[str, dict]:
    return {it["repo"].partition(f"{mark}-")[2]: it for it in json.loads(out) if mark in it["repo"]}


def test_list_and_search(shelf, run_cli, monkeypatch) -> None:
    listed = rows_of(run_cli("list", "ada", "--json")[1], shelf)
    assert {name: (it["version"], it["private"]) for name, it in listed.items()} == {
        "orders": ("1.1.0", False),
        "hidden": ("1.1.0", True),
        "plain": (None, False),
    }
    assert listed["orders"]["base"] == f"tiny/llama-{shelf}"
    assert rows_of(run_cli("list", "--json")[1], shelf) == listed
    found = rows_of(run_cli("search", "--base", f"tiny/llama-{shelf}", "--json")[1], shelf)
    assert set(found) == {"orders", "hidden"}
    by_task = ("search", f"{shelf}-orders", "--task")
    assert set(rows_of(run_cli(*by_task, "text-generation", "--json")[1], shelf)) == {"orders"}
    code, out, err = run_cli(*by_task, "translation")
    assert (code, out, err) == (0, "", "nothing found\n")
    lines = [line.split() for line in run_cli("list", "ada")[1].splitlines()]
    assert [f"ada/{shelf}-orders", "1.1.0"] in [line[:2] for line in lines]
    monkeypatch.setenv("HF_TOKEN", "")
    assert "hidden" not in rows_of(run_cli("list", "ada", "--json")[1], shelf)


def test_info_tells_of_a_release_without_its_weights(shelf, run_cli, hub_cache: Path, tmp_path: Path) -> None:
    code, out, err = run_cli("info", f"ada/{shelf}-orders")
    assert code == 0, err
    told = dict(line.split(maxsplit=1) for line in reversed(out.splitlines()))
    assert told["versions"] == "1.1.0, 1.0.0"
    assert (told["scores"], told["signer"]) == ("not measured", "none: it is not signed")
    assert told["changes"] == "since 1.0.0: card: README.md changed (patch)"
    assert not list(hub_cache.rglob("*.safetensors"))
    path = tmp_path / "1.1.0"
    (path / MANIFEST_NAME).write_bytes(Manifest.read(path).model_copy(update={"version": "1.2.0"}).to_bytes())
    pair = generate_key(tmp_path / "keys")
    sign_release(path, pair.private)
    push(Release.open(path), f"ada/{shelf}-orders")
    found = json.loads(run_cli("info", f"ada/{shelf}-orders@latest", "--json")[1])
    assert (found["tag"], found["signed"], found["signers"]) == ("v1.2.0", True, [])
    assert (found["previous"], found["changes"]) == ("1.1.0", [])
    assert json.loads(run_cli("info", f"ada/{shelf}-orders@1.0.0", "--json")[1])["changes"] is None
    assert run_cli("info", f"ada/{shelf}-plain")[0] == 3
    assert run_cli("info", "ada/never-made")[0] == 5


def test_a_repository_moves_and_a_tag_goes(shelf, run_cli, hub_server) -> None:
    code, out, _ = run_cli("repo", "move", f"ada/{shelf}-orders", f"ada/{shelf}-moved")
    assert (code, out.strip()) == (0, f"{hub_server.url}/ada/{shelf}-moved")
    assert run_cli("repo", "move", f"ada/{shelf}-moved", f"ada/{shelf}-plain")[0] == 5
    gone = json.loads(run_cli("repo", "untag", f"ada/{shelf}-moved@1.1.0", "--json")[1])
    assert run_cli("pull", f"ada/{shelf}-moved@1.1.0")[0] == 5
    assert run_cli("pull", f"ada/{shelf}-moved@{gone['commit']}")[0] == 0
    code, _, err = run_cli("repo", "untag", f"ada/{shelf}-moved@9.9.9")
    assert (code, "has no tag v9.9.9" in err) == (5, True)
    assert run_cli("repo", "untag", f"ada/{shelf}-moved")[0] == 5
