"""Uploads through hf_xet, as an unmodified client on the Hub's own machine sends them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.hub.server.xet import read_shard

pytest.importorskip("hf_xet")


@pytest.fixture(autouse=True)
def _xet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)


@pytest.fixture
def api(hub_server) -> HfApi:
    return HfApi(endpoint=hub_server.url, token=hub_server.token)


def left_over(hub_server, repo: str) -> list[Path]:
    return list((hub_server.root / "models" / f"{repo}.git" / "lfs" / "incomplete").glob("*"))


def test_files_and_bytes_arrive_whole_and_leave_no_copy(hub_server, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("ada/xet")
    data = os.urandom(700_000)
    (tmp_path / "w.safetensors").write_bytes(data)
    api.create_commit(
        "ada/xet",
        [
            CommitOperationAdd("w.safetensors", str(tmp_path / "w.safetensors")),
            CommitOperationAdd("same.bin", data),
            CommitOperationAdd("tail.bin", data[:200_000] + b"other"),
            CommitOperationAdd("text.txt", b"text"),
        ],
        commit_message="through xet",
    )
    for name, expected in (
        ("w.safetensors", data),
        ("same.bin", data),
        ("tail.bin", data[:200_000] + b"other"),
        ("text.txt", b"text"),
    ):
        got = api.hf_hub_download("ada/xet", name, cache_dir=tmp_path / "cache")
        assert Path(got).read_bytes() == expected
    assert left_over(hub_server, "ada/xet") == []


def test_a_folder_comes_through_the_clients_pipeline(hub_server, api: HfApi, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for n in range(30):
        (folder / f"d{n % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"d{n % 3}" / f"{n}.bin").write_bytes(b"\0" + os.urandom(5000))
        (folder / f"d{n % 3}" / f"{n}.txt").write_text(f"text {n}")
    api.create_repo("ada/xet-folder")
    api.upload_folder(repo_id="ada/xet-folder", folder_path=folder)
    pulled = Path(api.snapshot_download("ada/xet-folder", cache_dir=tmp_path / "cache"))
    for path in folder.rglob("*.*"):
        assert (pulled / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert left_over(hub_server, "ada/xet-folder") == []
    again = api.upload_folder(repo_id="ada/xet-folder", folder_path=folder)
    assert again.oid == api.model_info("ada/xet-folder").sha


def test_damaged_chunks_are_refused(hub_server, api: HfApi) -> None:
    """Whatever stands in the shared folder, nothing gets a sha256's name but the bytes with that sha256."""
    api.create_repo("ada/xet-damaged")
    addition = CommitOperationAdd("w.bin", os.urandom(300_000))
    api.preupload_lfs_files("ada/xet-damaged", [addition])
    (folder,) = left_over(hub_server, "ada/xet-damaged")
    assert folder.stat().st_mode & 0o077 == 0
    (xorb,) = (path for path in folder.glob("xet/xorbs/xorbs/default.*") if path.suffix != ".tagset")
    raw = bytearray(xorb.read_bytes())
    raw[1000] ^= 0xFF
    xorb.chmod(0o600)
    xorb.write_bytes(raw)
    before = api.model_info("ada/xet-damaged").sha
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit("ada/xet-damaged", [addition], commit_message="damaged")
    assert refused.value.response.status_code == 422
    assert api.model_info("ada/xet-damaged").sha == before
    objects = hub_server.root / "models" / "ada" / "xet-damaged.git" / "lfs" / "objects"
    assert [path for path in objects.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_hf_upload_without_any_setting(hub_server, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "w.safetensors").write_bytes(data)
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_XET"}
    env |= {"HF_ENDPOINT": hub_server.url, "HF_TOKEN": hub_server.token, "HF_HOME": str(tmp_path / "home")}
    hf = Path(sys.executable).with_name("hf")
    for command in (
        [hf, "upload", "ada/hf-xet", tmp_path / "w.safetensors", "w.safetensors"],
        [hf, "download", "ada/hf-xet", "--local-dir", tmp_path / "down"],
    ):
        done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "down" / "w.safetensors").read_bytes() == data


@given(st.binary(max_size=600))
def test_any_bytes_can_be_read_as_a_shard(shard: bytes) -> None:
    for found in read_shard(shard):
        assert len(found.hash) == len(found.sha256) == 64
        assert found.size >= 0
