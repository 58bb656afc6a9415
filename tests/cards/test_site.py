"""site: a gallery of many releases that needs no server, holds what it claims, and is gone on with."""

from __future__ import annotations

import json
import re
import shutil
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from adapterhub.cards.gallery import collect, find_releases
from adapterhub.cards.site import render_site
from adapterhub.packaging.evidence import SCORES

RunCli = Callable[..., tuple[int, str, str]]
Edit = Callable[..., None]
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


@pytest.fixture
def shelf(rich_release: Path, tmp_path: Path, edit: Edit) -> Path:
    """Two versions of one release, another that was not measured, one edited, one broken, and no release."""
    folder = tmp_path / "shelf"
    shutil.copytree(rich_release, folder / "orders")
    shutil.copytree(rich_release, folder / "deep" / "older")
    edit(folder / "deep" / "older", version="0.0.9")
    shutil.copytree(rich_release, folder / "poems")
    shutil.rmtree(folder / "poems" / "evidence")
    hostile = '</script><script>alert(1)</script> & "poems"'
    files = {"adapter_model.safetensors", "adapter_config.json"}
    edit(folder / "poems", name="poems", task=hostile)
    manifest = json.loads((folder / "poems" / "adapterhub.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name in files}
    (folder / "poems" / "adapterhub.json").write_text(json.dumps(manifest))
    shutil.copytree(rich_release, folder / "edited")
    edit(folder / "edited", name="edited")
    scores = folder / "edited" / SCORES
    scores.write_bytes(scores.read_bytes().replace(b"0.97", b"0.99", 1))
    (folder / "broken").mkdir()
    (folder / "broken" / "adapterhub.json").write_text("{")
    (folder / "notes").mkdir()
    return folder


def test_every_sound_release_has_a_page_and_every_version_its_card(
    shelf: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    code, out, err = run_cli("site", shelf, "--out", tmp_path / "site")
    assert code == 0, err
    site = tmp_path / "site"
    assert Path(out.strip()) == site / "index.html"
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    cards = {
        f"releases/{name}/card.html" for name in ("tiny-orders/0.1.0", "tiny-orders/0.0.9", "poems/0.1.0")
    }
    assert pages == {
        "index.html", "compare.html", "releases/tiny-orders/index.html", "releases/poems/index.html", *cards
    }  # fmt: skip
    index = (site / "index.html").read_text()
    assert "98.0 %" in index
    assert "tiny-llama" in index
    assert "2 versions" in index
    data = json.loads((site / "site.json").read_text())
    assert [it["failures"] for it in data["releases"]] == [None, 4, 4]
    for page in site.rglob("*.html"):
        for target in re.findall(r'href="([^"#]+)', page.read_text()):
            assert (page.parent / target).resolve().is_file(), (page, target)


def test_what_cannot_be_shown_is_listed_with_its_error_and_no_path_of_this_machine(
    shelf: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    _, _, err = run_cli("site", shelf, "--out", tmp_path / "site")
    index = (tmp_path / "site" / "index.html").read_text()
    for name in ("broken", "edited"):
        assert f"<code>{name}</code>" in index
        assert f"not shown: {name}" in err
    assert "evidence/scores.json" in index
    assert str(tmp_path) not in index


def test_hostile_words_stay_words_and_only_our_script_may_run(shelf: Path) -> None:
    files = render_site(collect((path.name, path) for path in find_releases(shelf)), "all <b>")
    for name, content in files.items():
        if not name.endswith(".html"):
            continue
        html = content.decode()
        assert "alert(1)</script>" not in html
        assert "all <b>" not in html
        assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html)
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
        assert policy is not None
        assert "default-src &#39;none&#39;" in policy[1] or "default-src 'none'" in policy[1]
        for script in SCRIPT.findall(html):
            assert b64encode(sha256(script.encode()).digest()).decode() in policy[1]


@pytest.mark.slow
def test_a_rebuild_is_the_same_keeps_strangers_files_and_drops_what_is_gone(
    shelf: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    site = tmp_path / "site"
    shutil.rmtree(shelf / "deep")
    run_cli("site", shelf, "--out", site)
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    (site / "CNAME").write_text("adapters.example\n")
    run_cli("site", shelf, "--out", site)
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(shelf / "poems")
    assert run_cli("site", shelf, "--out", site)[0] == 0
    assert not (site / "releases" / "poems").exists()
    assert (site / "CNAME").is_file()


def test_the_same_version_twice_is_shown_once_and_a_copy_is_no_error(shelf: Path, edit: Edit) -> None:
    edit(shelf / "deep" / "older", version="0.1.0", licence="mit")
    shutil.copytree(shelf / "orders", shelf / "deep" / "copy")
    gallery = collect((path.name, path) for path in find_releases(shelf))
    assert [it.newest.ref for it in gallery.shelves] == ["poems", "orders"]
    told = {it.ref: it.why for it in gallery.absent}
    assert set(told) == {"broken", "edited", "older"}
    assert "has the name and version of orders" in told["older"]


def test_a_folder_of_something_else_is_not_written_into(shelf: Path, tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    code, _, err = run_cli("site", shelf, "--out", tmp_path / "mine")
    assert (code, "exists already" in err) == (3, True)
    (tmp_path / "mine" / "site.json").write_text('{"files": ["../letter.txt"]}')
    code, _, err = run_cli("site", shelf, "--out", tmp_path / "mine")
    assert (code, "not a site's list" in err) == (3, True)
    code, _, err = run_cli("site", tmp_path / "shelf" / "notes", "--out", tmp_path / "new")
    assert (code, "holds no releases" in err) == (3, True)
    code, _, err = run_cli("site", tmp_path / "nowhere", "--out", tmp_path / "new")
    assert (code, "no such folder" in err) == (3, True)
