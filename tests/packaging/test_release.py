"""Release folders: sealed whole, checked file by file, added to without breaking a signature."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from adapterhub.errors import ManifestError, ReleaseError, SignatureError
from adapterhub.packaging.files import list_files
from adapterhub.packaging.manifest import FileEntry, Manifest
from adapterhub.packaging.release import Release, new_release

DRAFT = Manifest(name="x", version="0.1.0", created=datetime(2026, 1, 1, tzinfo=UTC))


def test_a_new_release_lists_every_file_with_its_digest(tmp_path: Path) -> None:
    with new_release(tmp_path / "x", DRAFT) as staging:
        (staging / "a").write_bytes(b"a")
        (staging / "evidence").mkdir()
        (staging / "evidence" / "b.json").write_bytes(b"{}")
    release = Release.open(tmp_path / "x")
    assert release.manifest.files == {
        "a": FileEntry(sha256=hashlib.sha256(b"a").hexdigest(), size=1),
        "evidence/b.json": FileEntry(sha256=hashlib.sha256(b"{}").hexdigest(), size=2),
    }
    assert release.size == 3
    assert not release.is_signed
    release.check_files()


def test_digests_known_already_are_taken_and_still_checked_later(tmp_path: Path) -> None:
    known: dict[str, FileEntry] = {}
    with new_release(tmp_path / "x", DRAFT, known) as staging:
        (staging / "a").write_bytes(b"a")
        (staging / "b").write_bytes(b"b")
        known["a"] = FileEntry(sha256="0" * 64, size=1)
    release = Release.open(tmp_path / "x")
    assert release.manifest.files["a"].sha256 == "0" * 64
    release.check_files(["b"])
    with pytest.raises(SignatureError, match="/a is not the file"):
        release.check_files()


def test_a_release_that_fails_or_would_overwrite_leaves_nothing(tmp_path: Path) -> None:
    def fill_and_fail() -> None:
        with new_release(tmp_path / "x", DRAFT) as staging:
            (staging / "a").write_bytes(b"a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill_and_fail()
    assert list_files(tmp_path) == []
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("mine")
    with pytest.raises(ReleaseError, match="exists already"), new_release(tmp_path / "x", DRAFT):
        pass
    assert list_files(tmp_path) == ["x/mine"]


def test_a_release_may_not_list_its_own_signature(tmp_path: Path) -> None:
    with (
        pytest.raises(ManifestError, match="cannot list itself"),
        new_release(tmp_path / "x", DRAFT) as staging,
    ):
        (staging / "model.sig").write_bytes(b"a")
    assert list_files(tmp_path) == []


def test_every_change_to_the_files_is_found(tiny_release: Path) -> None:
    release = Release.open(tiny_release)
    release.check_files()
    path = tiny_release / "tokenizer.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b" ")
    with pytest.raises(SignatureError, match=r"tokenizer\.json is not the file"):
        release.check_files()
    release.check_files(["adapter_config.json"])
    path.unlink()
    with pytest.raises(SignatureError, match=r"tokenizer\.json is listed .* but missing"):
        release.check_files()
    path.write_bytes(whole)
    (tiny_release / "deep").mkdir()
    (tiny_release / "deep" / "modeling.py").write_text("")
    with pytest.raises(SignatureError, match=r"does not list: deep/modeling\.py"):
        release.check_files()


def test_what_the_hub_adds_is_no_stray_file(tiny_release: Path) -> None:
    (tiny_release / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    Release.open(tiny_release).check_files()


def test_files_are_added_replaced_and_listed(tiny_release: Path) -> None:
    before = Release.open(tiny_release)
    digest = before.digest
    after = before.with_files({"evidence/x.json": b"{}", "README.md": b"# x"})
    assert Release.open(tiny_release) == after
    after.check_files()
    assert after.digest != digest
    again = after.with_files({"README.md": b"# y"})
    again.check_files()
    assert (tiny_release / "README.md").read_bytes() == b"# y"


def test_a_signed_release_is_not_changed_under_its_signature(tiny_release: Path) -> None:
    release = Release.open(tiny_release).with_files({"README.md": b"# x"})
    (tiny_release / "model.sig").write_text("{}")
    same = release.with_files({"README.md": b"# x"})
    assert same == release
    with pytest.raises(ReleaseError, match=r"is signed, and this would change README\.md"):
        release.with_files({"README.md": b"# y"})
    assert (tiny_release / "README.md").read_bytes() == b"# x"


@pytest.mark.parametrize("name", ["../x", "/x", "model.sig", "adapterhub.json", "ADAPTER_CONFIG.json"])
def test_added_files_stay_inside_and_apart(tiny_release: Path, name: str) -> None:
    before = list_files(tiny_release.parent)
    with pytest.raises(ManifestError):
        Release.open(tiny_release).with_files({name: b"x"})
    assert list_files(tiny_release.parent) == before


def test_the_digest_is_of_the_bytes_that_lie_there(tiny_release: Path) -> None:
    path = tiny_release / "adapterhub.json"
    before = Release.open(tiny_release)
    assert before.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"\n")
    assert Release.open(tiny_release).manifest == before.manifest
    assert Release.open(tiny_release).digest == hashlib.sha256(path.read_bytes()).hexdigest()
