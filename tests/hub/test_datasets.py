"""Rows fetched from a dataset repository, in the layouts that the Hub usually has."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants

from adapterhub.errors import DataError, RefError
from adapterhub.hub.datasets import fetch_rows
from adapterhub.trainer.data import read_rows

_ROW = {"prompt": "two apples", "completion": "2"}
_JSONL = json.dumps(_ROW).encode() + b"\n"


@pytest.fixture(autouse=True)
def _plain_lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_DISABLE_XET=1 before the import does."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def publish(hub_server, request: pytest.FixtureRequest):
    """``publish({path: bytes})`` -> the name of a dataset repository that holds just these files."""

    def run(files: dict[str, bytes]) -> str:
        api = HfApi(endpoint=hub_server.url, token=hub_server.token)
        name = sha256(request.node.nodeid.encode()).hexdigest()[:12]
        repo = api.create_repo(f"ada/rows-{name}", repo_type="dataset").repo_id
        operations = [CommitOperationAdd(path, data) for path, data in files.items()]
        api.create_commit(repo, operations, commit_message="rows", repo_type="dataset")
        return repo

    return run


def _parquet(rows: int, tmp_path: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([_ROW] * rows), path)
    return path.read_bytes()


def test_the_hubs_usual_layout(hub_server, publish, tmp_path: Path) -> None:
    repo = publish(
        {
            "README.md": b"---\nlicense: mit\n---\n",
            "dataset_infos.json": b"{}",
            "data/train-00000-of-00002.parquet": _parquet(3, tmp_path),
            "data/train-00001-of-00002.parquet": _parquet(2, tmp_path),
            "data/test-00000-of-00001.parquet": _parquet(1, tmp_path),
        }
    )
    train = fetch_rows(repo, "train", endpoint=hub_server.url)
    assert sorted(path.name for path in train.folder.iterdir()) == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    test = fetch_rows(repo, "test", endpoint=hub_server.url)
    assert len(read_rows(train.folder, "train")) == 5
    assert len(read_rows(test.folder, "test")) == 1
    assert (train.name, train.revision) == (repo, test.revision)
    assert fetch_rows(f"{repo}@{train.revision}", "train", endpoint="http://127.0.0.1:9") == train


def test_splits_as_folders_and_rows_of_one_split_only(hub_server, publish) -> None:
    repo = publish({"train/0.jsonl": _JSONL * 3, "test/0.jsonl": _JSONL, "notes/validation.txt": b"x"})
    for split, count in (("test", 1), ("train", 3), ("test", 1)):
        fetched = fetch_rows(repo, split, endpoint=hub_server.url)  # type: ignore[arg-type]
        assert len(read_rows(fetched.folder, split)) == count  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_without_a_splits_name_are_the_split(hub_server, publish, split) -> None:
    repo = publish({"orders.jsonl": _JSONL, "contrain.jsonl": _JSONL, "dataset_infos.json": b"{}"})
    fetched = fetch_rows(repo, split, endpoint=hub_server.url)
    assert len(read_rows(fetched.folder, split)) == 2


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"README.md": b"x", "dataset_infos.json": b"{}"}, "no data files"),
        (
            {"validation.jsonl": _JSONL, "train.jsonl": _JSONL},
            "no files of the test split, only of train, valid",
        ),
        ({"main/test.jsonl": _JSONL, "socratic/test.jsonl": _JSONL}, r"2 ways: main/\*.jsonl and socratic/"),
        ({"test.jsonl": _JSONL, "test.json": b"[]"}, r"2 ways: \*.json and \*.jsonl"),
    ],
)
def test_what_is_missing_or_ambiguous_is_said(
    hub_server, publish, files: dict[str, bytes], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        fetch_rows(publish(files), "test", endpoint=hub_server.url)


def test_an_unknown_dataset_is_named(hub_server) -> None:
    with pytest.raises(RefError, match="ada/no-rows"):
        fetch_rows("ada/no-rows", "train", endpoint=hub_server.url)
