"""push and pull --type dataset: rows in files become a version that a training run names."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from uuid import uuid4

import pytest
from huggingface_hub import HfApi

from adapterhub.hub.datasets import fetch_rows
from adapterhub.packaging.dataset.evidence import read_dataset_evidence
from adapterhub.packaging.files import list_files
from adapterhub.packaging.keys import generate_key
from adapterhub.trainer.data import read_rows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def repo(hub_server, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", hub_server.token)
    return f"ada/rows-{uuid4().hex[:8]}"


def rows(count: int) -> list[dict]:
    return [{"prompt": f"{number} apples, please", "completion": str(number)} for number in range(count)]


def test_rows_become_a_version_that_training_takes(
    run_cli: Run, hub_server, hub_cache, repo, write_jsonl, tmp_path
) -> None:
    file = write_jsonl(tmp_path / "orders.jsonl", rows(40))
    options = ("--type", "dataset", "--test-share", "0.25", "--licence", "cc-by-4.0")
    dry = json.loads(run_cli("push", file, repo, *options, "--dry-run", "--json")[1])
    assert dry["outcome"] == "dry run"
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    assert not api.repo_exists(repo, repo_type="dataset")
    code, out, err = run_cli("push", file, repo, *options, "--message", "Forty orders")
    assert code == 0, err
    assert out.splitlines()[1] == "tag     v1.0.0"
    assert api.list_repo_commits(repo, repo_type="dataset")[0].title == "Forty orders"
    assert "license:cc-by-4.0" in api.dataset_info(repo).tags
    again = json.loads(run_cli("push", file, repo, *options, "--json")[1])
    assert (again["outcome"], again["tag"]) == ("already there", "v1.0.0")
    assert not [name for name in list_files(hub_cache) if "/push/" in name]

    pulled = json.loads(run_cli("pull", f"{repo}@latest", "--type", "dataset", "--json")[1])
    splits = {it.split: it.rows for it in read_dataset_evidence(Path(pulled["path"])).splits}
    assert sum(splits.values()) == 40
    for name in ("v1", "latest", "1.0.0"):
        fetched = fetch_rows(f"{repo}@{name}", "train", endpoint=hub_server.url)
        assert fetched.revision == pulled["commit"]
    assert len(list(read_rows(fetched.folder, "train"))) == splits["train"]


class Later(datetime):
    """An hour later than it is."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + timedelta(hours=1)


def test_a_signed_push_cut_off_before_the_tag_is_completed_and_its_version_not_taken_by_other_rows(
    run_cli: Run, hub_server, repo, write_jsonl, tmp_path, monkeypatch
) -> None:
    key = ("--key", generate_key(tmp_path / "keys").private)
    file = write_jsonl(tmp_path / "orders.jsonl", rows(3))
    first = json.loads(run_cli("push", file, repo, "--type", "dataset", *key, "--json")[1])
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    api.delete_tag(repo, tag="v1.0.0", repo_type="dataset")
    other = write_jsonl(tmp_path / "other.jsonl", rows(4))
    code, _, err = run_cli("push", other, repo, "--type", "dataset")
    assert (code, "had other content as 1.0.0" in err) == (3, True)
    other_key = ("--key", generate_key(tmp_path / "others").private)
    code, _, err = run_cli("push", file, repo, "--type", "dataset", *other_key)
    assert (code, "had other signatures as 1.0.0" in err) == (3, True)
    monkeypatch.setattr("adapterhub.hub.publishing.datetime", Later)
    again = json.loads(run_cli("push", file, repo, "--type", "dataset", *key, "--json")[1])
    assert (again["outcome"], again["commit"]) == ("tagged", first["commit"])
    assert len(api.list_repo_commits(repo, repo_type="dataset")) == 2


@pytest.mark.slow
def test_a_dataset_is_proposed_once_and_tagged_when_it_is_merged(
    run_cli: Run, hub_server, repo, write_jsonl, tmp_path, monkeypatch
) -> None:
    key = ("--key", generate_key(tmp_path / "keys").private)
    push = ("push", tmp_path / "orders.jsonl", repo, "--type", "dataset", *key, "--json")
    write_jsonl(tmp_path / "orders.jsonl", rows(3))
    run_cli(*push)
    write_jsonl(tmp_path / "orders.jsonl", rows(4))
    proposed = json.loads(run_cli(*push, "--create-pr")[1])
    assert (proposed["outcome"], proposed["tag"]) == ("proposed", "v1.1.0")
    monkeypatch.setattr("adapterhub.hub.publishing.datetime", Later)
    for options in ((), ("--message", "Another title"), ("--dry-run",)):
        again = json.loads(run_cli(*push, "--create-pr", *options)[1])
        assert (again["outcome"], again["url"]) == ("proposed before", proposed["url"])
    write_jsonl(tmp_path / "orders.jsonl", rows(5))
    assert json.loads(run_cli(*push, "--create-pr")[1])["url"].endswith(f"/datasets/{repo}/discussions/2")
    write_jsonl(tmp_path / "orders.jsonl", rows(4))
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    api.merge_pull_request(repo, 1, repo_type="dataset")
    assert json.loads(run_cli(*push)[1])["outcome"] == "tagged"
    assert fetch_rows(repo, "train", endpoint=hub_server.url).revision == api.dataset_info(repo).sha


def test_a_branch_gets_a_version_that_its_name_alone_means_and_no_model_is_a_dataset(
    run_cli: Run, hub_server, repo, write_jsonl, tmp_path
) -> None:
    file = write_jsonl(tmp_path / "orders.jsonl", rows(3))
    run_cli("push", file, repo, "--type", "dataset")
    write_jsonl(file, rows(4))
    newer = json.loads(run_cli("push", file, repo, "--type", "dataset", "--branch", "next", "--json")[1])
    assert newer["tag"] == "v1.1.0"
    assert HfApi(endpoint=hub_server.url).dataset_info(repo).sha != newer["commit"]
    assert fetch_rows(repo, "train", endpoint=hub_server.url).revision == newer["commit"]
    for command in ("pull", "info"):
        code, _, err = run_cli(command, repo)
        assert (code, err) == (5, f"error: {repo} is a dataset\nfix: add --type dataset\n")
    assert "rows: data/train-00000-of-00001.parquet changed" in run_cli("info", repo, "--type", "dataset")[1]


def test_malformed_rows_are_named(run_cli: Run, repo, write_jsonl, tmp_path) -> None:
    file = write_jsonl(tmp_path / "orders.jsonl", [*rows(2), {"prompt": "", "completion": "1"}])
    code, _, err = run_cli("push", file, repo, "--type", "dataset")
    assert code == 2
    assert "orders.jsonl, line 3: the prompt is empty" in err
    assert run_cli("push", file, repo)[0] == 3
