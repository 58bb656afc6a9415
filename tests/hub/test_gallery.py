"""An owner's gallery: every version on a real Hub, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from adapterhub.cards.card import read_card
from adapterhub.cards.rendering import render_files
from adapterhub.hub.push import push
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.release import Release


@pytest.mark.slow
def test_an_owners_releases_become_a_site_and_no_weights_are_fetched(
    start_hub: Callable[..., Any],
    tiny_release: Path,
    tmp_path: Path,
    hub_cache: Path,
    run_cli: Callable[..., Any],
) -> None:
    with start_hub(tmp_path / "root", user="") as hub:
        for version in ("0.1.0", "0.2.0"):
            manifest = Manifest.read(tiny_release).model_copy(update={"version": version})
            (tiny_release / MANIFEST_NAME).write_bytes(manifest.to_bytes())
            release = Release.open(tiny_release)
            release.with_files(render_files(read_card(release)))
            push(Release.open(tiny_release), "ada/orders", endpoint=hub.url)
        api = HfApi(endpoint=hub.url)
        api.create_repo("ada/plain")  # no release: no version tag
        api.create_repo("ada/other")
        api.upload_file(path_or_fileobj=b"{", path_in_repo=MANIFEST_NAME, repo_id="ada/other")
        api.create_tag("ada/other", tag="v1.0.0")
        code, out, err = run_cli("site", "ada", "--out", tmp_path / "site", "--endpoint", hub.url)
        assert code == 0, err
        assert "1 releases, 2 versions" in err
        assert "not shown: ada/other@v1.0.0" in err
        assert "ada/orders@v0.2.0" in (tmp_path / "site/releases/tiny-orders/index.html").read_text()
        assert Path(out.strip()).is_file()
        assert not [path for path in hub_cache.rglob("*") if path.suffix == ".safetensors"]
        code, _, err = run_cli("site", "nobody", "--out", tmp_path / "none", "--endpoint", hub.url)
        assert (code, "lists no models of nobody" in err) == (5, True)
