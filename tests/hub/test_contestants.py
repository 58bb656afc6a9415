"""Who takes part in an arena from a Hub: a base model is one, an unsound release is an error and no base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from adapterhub.commands.contestants import find_contestant
from adapterhub.errors import ManifestError
from adapterhub.packaging.files import MANIFEST_NAME


def test_a_base_on_a_hub_takes_part_and_a_broken_release_does_not(hub_server: Any, tiny_base: Path) -> None:
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    api.create_repo("ada/contestant")
    commit = api.upload_folder(repo_id="ada/contestant", folder_path=tiny_base).oid
    found = find_contestant("ada/contestant", hub_server.url)
    assert found.name == f"contestant@{commit[:12]}"
    assert found.checkpoint is not None
    assert found.sha256 == find_contestant(str(tiny_base), None).sha256
    api.upload_file(path_or_fileobj=b"{", path_in_repo=MANIFEST_NAME, repo_id="ada/contestant")
    with pytest.raises(ManifestError):
        find_contestant("ada/contestant", hub_server.url)
