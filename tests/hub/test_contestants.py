"""Who takes part in an arena from a Hub: a base model is one, an unsound release is an error and no base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from adapterhub.commands.contestants import find_contestant
from adapterhub.errors import ManifestError
from adapterhub.packaging.files import MANIFEST_NAME


def test_a_base_on_a_hub_takes_part_and_a_broken_release_does_not(
    start_hub: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    with start_hub(tmp_path / "root", user="") as hub:
        api = HfApi(endpoint=hub.url)
        api.create_repo("ada/tiny")
        commit = api.upload_folder(repo_id="ada/tiny", folder_path=tiny_base).oid
        found = find_contestant("ada/tiny", hub.url)
        assert found.name == f"tiny@{commit[:12]}"
        assert found.checkpoint is not None
        assert found.sha256 == find_contestant(str(tiny_base), None).sha256
        api.upload_file(path_or_fileobj=b"{", path_in_repo=MANIFEST_NAME, repo_id="ada/tiny")
        with pytest.raises(ManifestError):
            find_contestant("ada/tiny", hub.url)
