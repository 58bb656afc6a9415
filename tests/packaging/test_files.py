"""Files written whole or not at all, and names that stay inside their folder."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import ReleaseError
from adapterhub.packaging.files import (
    check_relative_path,
    list_files,
    sha256_file,
    staged_folder,
    write_atomic,
)


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"something longer")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list_files(tmp_path) == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full_disk(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list_files(tmp_path) == ["file"]


def test_a_staged_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with staged_folder(target) as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "a").write_text("a")
        assert not target.exists()
    assert list_files(target) == ["deep/a"]
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_a_staged_folder_replaces_an_empty_one_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with staged_folder(tmp_path / "empty") as staging:
        (staging / "a").write_text("a")
    for name in ("empty", "file"):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ReleaseError, match="exists already"), staged_folder(tmp_path / name):
            pass
    assert (tmp_path / "empty" / "a").read_text() == "a"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fill_and_fail() -> None:
        with staged_folder(tmp_path / "x") as staging:
            (staging / "a").write_text("a")
            raise error

    with pytest.raises(error):
        fill_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_a_living_one_holds_stays(tmp_path: Path) -> None:
    """Each holds a staged folder with a file in it, and is killed there."""
    hold = (
        "import sys, time; from pathlib import Path; from adapterhub.packaging.files import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); print(folder.name, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "release")]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as living,
    ):
        names = {process: process.stdout.readline().strip() for process in (killed, living)}
        (tmp_path / ".release.2.abcdefgh.tmp").mkdir()  # another target's
        killed.kill()
        killed.wait()
        with staged_folder(tmp_path / "release") as folder:
            there = {path.name for path in tmp_path.iterdir()}
        assert there == {names[living], folder.name, ".release.2.abcdefgh.tmp"}
        living.kill()


@given(st.binary(max_size=300_000))
def test_digests_are_sha256(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(data)
    assert sha256_file(path) == hashlib.sha256(data).hexdigest()


SEGMENT = st.text(st.characters(categories=("L", "N"), include_characters="._- "), min_size=1).filter(
    lambda text: text not in (".", "..") and text[1:2] != ":"
)


@given(st.lists(SEGMENT, min_size=1, max_size=4).map("/".join).filter(lambda text: len(text) <= 512))
def test_plain_relative_paths_pass_as_they_are(path: str) -> None:
    if path.isprintable():
        assert check_relative_path(path) == path


@given(st.text(st.sampled_from("./\\:aC\n\x00~ ") | st.characters(), max_size=40))
def test_what_passes_stays_inside_its_folder(path: str) -> None:
    try:
        check_relative_path(path)
    except ValueError:
        return
    joined = os.path.normpath(Path("/base") / path)
    assert joined.startswith("/base/")
    assert PurePosixPath(joined) == PurePosixPath("/base") / path
    assert path.isprintable()
    assert not path.startswith("/")
    assert "\\" not in path


@pytest.mark.parametrize(
    "path",
    ["", "/a", "..", "a/..", "../a", "a/../b", ".", "./a", "a//b", "a/", "C:/x", "a\\b", "a\nb", "x" * 513],
)
def test_paths_that_could_leave_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"not a relative path|has an empty|characters"):
        check_relative_path(path)


def test_links_to_files_are_listed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    assert list_files(tmp_path) == ["link", "real/file"]
