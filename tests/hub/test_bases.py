"""Bases fetched from a real Hub: what is downloaded, and what does not go unnoticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from adapterhub.errors import HubError, RefError, ReleaseError
from adapterhub.hub.bases import fetch_base, fetch_config
from adapterhub.packaging.base import check_base, lock_base


@pytest.fixture(autouse=True)
def _plain_lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_DISABLE_XET=1 before the import does."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def published(hub_server, tiny_base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The tiny base on the Hub, among files that loading does not need."""
    folder = tmp_path / "published"
    shutil.copytree(tiny_base, folder)
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "onnx/model.onnx",
        "original/x.safetensors",
        "README.md",
        "code.py",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not needed")
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    name = request.node.nodeid.rpartition("::")[2]
    repo = api.create_repo(f"ada/base-{sha256(name.encode()).hexdigest()[:12]}").repo_id
    api.upload_folder(repo_id=repo, folder_path=folder)
    return repo


def test_fetches_what_loading_needs_and_nothing_else(hub_server, published: str, tiny_base: Path) -> None:
    base = fetch_base(published, endpoint=hub_server.url)
    names = {path.relative_to(base.folder).as_posix() for path in base.folder.rglob("*") if path.is_file()}
    assert names == {path.name for path in tiny_base.iterdir()} | {"README.md"}
    assert base.name == published
    assert base.revision == HfApi(endpoint=hub_server.url).model_info(published).sha == base.folder.name
    assert base.weights == {
        "model.safetensors": sha256((tiny_base / "model.safetensors").read_bytes()).hexdigest()
    }
    check_base(lock_base(tiny_base, name="tiny"), base.folder, base.weights)


def test_a_fetched_base_loads(hub_server, published: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = fetch_base(published, endpoint=hub_server.url)
    assert AutoModelForCausalLM.from_pretrained(base.folder).config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(base.folder).chat_template


def test_the_configuration_comes_alone(hub_server, published: str, tiny_base: Path, hub_cache: Path) -> None:
    path = fetch_config(published, endpoint=hub_server.url)
    assert path.read_bytes() == (tiny_base / "config.json").read_bytes()
    assert [file.name for file in hub_cache.rglob("snapshots/*/*")] == ["config.json"]


def test_a_plan_with_rows_takes_the_tokenizer_and_no_weights(
    hub_server, published: str, hub_cache: Path, run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"prompt": "apples", "completion": "1"}\n')
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    rows = api.create_repo("ada/planned-rows", repo_type="dataset").repo_id
    api.upload_folder(repo_id=rows, repo_type="dataset", folder_path=tmp_path / "rows")
    arguments = ("--gpu", "48GiB", "--endpoint", hub_server.url, "--data", rows, "--json")
    code, out, stderr = run_cli("plan", published, *arguments)
    assert code == 0, stderr
    assert json.loads(out)["data"]["examples"] == 1
    assert list(hub_cache.rglob("tokenizer.json"))
    assert not list(hub_cache.rglob("*.safetensors"))


def test_small_weights_that_git_holds_are_hashed_here(hub_server, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    repo = api.create_repo("ada/base-in-git").repo_id
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / ".gitattributes").write_text("*.txt text\n")  # nothing is a large file here
    api.upload_folder(repo_id=repo, folder_path=tmp_path / "up")
    (tmp_path / "up" / "config.json").write_text("{}")
    (tmp_path / "up" / "model.safetensors").write_text("small text")
    api.upload_folder(repo_id=repo, folder_path=tmp_path / "up")
    listed = {it.path: it for it in api.list_repo_tree(repo)}
    assert listed["model.safetensors"].lfs is None
    base = fetch_base(repo, endpoint=hub_server.url)
    assert base.weights == {"model.safetensors": sha256(b"small text").hexdigest()}


def test_a_second_fetch_at_a_commit_needs_no_hub(hub_server, published: str) -> None:
    first = fetch_base(published, endpoint=hub_server.url)
    again = fetch_base(f"{published}@{first.revision}", endpoint="http://127.0.0.1:9")
    assert again == first
    with pytest.raises(HubError, match="may have moved") as error:
        fetch_base(published, endpoint="http://127.0.0.1:9")
    assert f"{published}@{first.revision}" in error.value.fix


def test_a_dead_hub_is_told_from_an_unknown_base(hub_server) -> None:
    with pytest.raises(HubError, match=r"no answer from http://127\.0\.0\.1:9") as error:
        fetch_base("ada/never-seen", endpoint="http://127.0.0.1:9")
    assert "check the network" in error.value.fix
    with pytest.raises(RefError, match="ada/never-seen"):
        fetch_base("ada/never-seen", endpoint=hub_server.url)


def test_an_unknown_revision_is_named(hub_server, published: str) -> None:
    with pytest.raises(RefError, match=f"{published}@v9.9.9.*no such revision"):
        fetch_base(f"{published}@9.9.9", endpoint=hub_server.url)
    with pytest.raises(RefError, match="no such revision"):
        fetch_base(f"{published}@{'0' * 40}", endpoint=hub_server.url)


def test_a_damaged_cache_does_not_go_unnoticed(hub_server, published: str) -> None:
    base = fetch_base(published, endpoint=hub_server.url)
    blob = (base.folder / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)  # the same size
    with pytest.raises(HubError, match=r"model\.safetensors") as error:
        fetch_base(published, endpoint=hub_server.url)
    assert str(blob) in error.value.fix
    blob.unlink()  # what the fix says
    assert fetch_base(published, endpoint=hub_server.url) == base


def test_damage_before_the_first_check_is_noticed_too(hub_server, published: str, hub_cache: Path) -> None:
    base = fetch_base(published, endpoint=hub_server.url)
    shutil.rmtree(next(hub_cache.glob("models--*/.adapterhub")))
    (base.folder / "config.json").resolve().write_bytes(b"x" * (base.folder / "config.json").stat().st_size)
    with pytest.raises(HubError, match=r"config\.json"):
        fetch_base(published, endpoint=hub_server.url)


def test_a_touched_file_with_the_same_content_is_fine(hub_server, published: str) -> None:
    base = fetch_base(published, endpoint=hub_server.url)
    os.utime((base.folder / "model.safetensors").resolve())
    assert fetch_base(published, endpoint=hub_server.url) == base


def test_a_file_removed_from_the_cache_comes_back(hub_server, published: str) -> None:
    base = fetch_base(published, endpoint=hub_server.url)
    (base.folder / "tokenizer.json").unlink()
    assert fetch_base(published, endpoint=hub_server.url) == base
    assert (base.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"model.safetensors": 1}', b'{"../x": {"sha256": ""}}', b"\xff"]
)
def test_an_unsound_note_of_earlier_checks_is_not_believed(
    hub_server, published: str, hub_cache: Path, content: bytes
) -> None:
    base = fetch_base(published, endpoint=hub_server.url)
    next(hub_cache.glob("models--*/.adapterhub/*.json")).write_bytes(content)
    assert fetch_base(published, endpoint=hub_server.url) == base


def test_pickles_are_named_and_refused(hub_server) -> None:
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    repo = api.create_repo("ada/base-pickled").repo_id
    api.upload_file(repo_id=repo, path_or_fileobj=b"\x80\x04.", path_in_repo="pytorch_model.bin")
    api.upload_file(repo_id=repo, path_or_fileobj=b"{}", path_in_repo="config.json")
    with pytest.raises(ReleaseError, match=r"pickles \(pytorch_model\.bin\)") as error:
        fetch_base(repo, endpoint=hub_server.url)
    assert "save_pretrained" in error.value.fix


def test_a_repository_without_weights_or_configuration_is_no_base(hub_server) -> None:
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    repo = api.create_repo("ada/base-empty").repo_id
    with pytest.raises(ReleaseError, match="holds no"):
        fetch_base(repo, endpoint=hub_server.url)
    with pytest.raises(RefError, match=r"config\.json"):
        fetch_config(repo, endpoint=hub_server.url)


def test_a_private_base_needs_its_token(hub_server, published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    HfApi(endpoint=hub_server.url, token=hub_server.token).update_repo_settings(published, private=True)
    with pytest.raises(RefError, match="no public repository") as error:
        fetch_base(published, endpoint=hub_server.url)
    assert "HF_TOKEN" in error.value.fix
    monkeypatch.setenv("HF_TOKEN", hub_server.token)
    assert fetch_base(published, endpoint=hub_server.url).name == published


def test_the_endpoint_comes_from_the_environment_as_it_is_now(
    hub_server, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url + "/")
    assert fetch_base(published).name == published
    with pytest.raises(HubError, match="not the address of a Hub"):
        fetch_base(published, endpoint="ftp://somewhere")


def test_offline_says_so(hub_server, published: str, hub_cache: Path) -> None:
    base = fetch_base(published, endpoint=hub_server.url)
    program = (
        "import sys; from adapterhub.hub.bases import fetch_base; from adapterhub.errors import HubError\n"
        "print(fetch_base(sys.argv[1]).revision)\n"
        "try: fetch_base('ada/other')\n"
        "except HubError as err: print(err.what)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache)}
    done = subprocess.run(
        [sys.executable, "-c", program, published],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    revision, message = done.stdout.splitlines()
    assert revision == base.revision
    assert "HF_HUB_OFFLINE" in message


def test_the_note_of_checks_holds_no_more_than_it_says(hub_server, published: str, hub_cache: Path) -> None:
    base = fetch_base(published, endpoint=hub_server.url)
    note = json.loads(next(hub_cache.glob("models--*/.adapterhub/*.json")).read_bytes())
    assert set(note) == {path.name for path in base.folder.iterdir()}
    assert note["config.json"]["sha256"] == sha256((base.folder / "config.json").read_bytes()).hexdigest()
