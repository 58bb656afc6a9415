"""``adapterhub scan owner/name``: a stranger's repository, release or not, looked at and left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.hub.conftest import HubServer

Run = Callable[..., tuple[int, str, str]]


def test_a_plain_repository_is_scanned_without_joining_the_cache_of_loaders(
    hub_server: HubServer,
    tiny_adapter: Path,
    tmp_path: Path,
    hub_cache: Path,
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import HfApi

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "plain"
    shutil.copytree(tiny_adapter, folder)
    (folder / "modeling.py").write_text("print('hello')")
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    api.create_repo("ada/scanned")
    api.upload_folder(repo_id="ada/scanned", folder_path=folder)
    code, out, err = run_cli("scan", "ada/scanned", "--endpoint", hub_server.url, "--json")
    assert code == 4, err
    rules = {finding["rule"] for finding in json.loads(out)["findings"]}
    assert {"code", "no-manifest"} <= rules
    assert "link" not in rules
    assert not list(hub_cache.glob("models--ada--scanned/snapshots/*/*"))


def test_an_unknown_repository_is_a_hub_error(hub_server: HubServer, run_cli: Run) -> None:
    code, _out, err = run_cli("scan", "ada/never-there", "--endpoint", hub_server.url)
    assert code == 5
    assert "ada/never-there" in err
