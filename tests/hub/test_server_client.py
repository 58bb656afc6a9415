"""The embedded Hub as the unmodified huggingface_hub client sees it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CARD = """---
license: mit
library_name: peft
pipeline_tag: text-generation
base_model: some/base
base_model_relation: adapter
tags: [orders, lora]
datasets: [ada/rows]
language: en
---
# A card
"""


@pytest.fixture(autouse=True)
def _plain_lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_DISABLE_XET=1 before the import does."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def api(hub_server) -> HfApi:
    return HfApi(endpoint=hub_server.url, token=hub_server.token)


@pytest.fixture
def repo(api: HfApi, request: pytest.FixtureRequest) -> str:
    """A fresh repository named after the test."""
    return api.create_repo(f"ada/{request.node.name.replace('[', '-').replace(']', '')[:80]}").repo_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Text, weights, an empty file, nested folders, and names that need quoting."""
    root = tmp_path / "upload"
    (root / "sub" / "deeper one").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    (root / "adapter_model.safetensors").write_bytes(os.urandom(300_000))
    (root / "sub" / "no suffix").write_bytes(b"\x00\x01binary")
    (root / "sub" / "deeper one" / "ünï 100%#?.txt").write_text("héllo")
    (root / "empty.txt").write_bytes(b"")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_a_pushed_folder_comes_back_byte_for_byte(
    api: HfApi, repo: str, folder: Path, tmp_path: Path
) -> None:
    commit = api.upload_folder(
        repo_id=repo, folder_path=folder, commit_message="all of it", commit_description="why"
    )
    pulled = Path(snapshot_download(repo, endpoint=api.endpoint, cache_dir=tmp_path / "cache"))
    got = contents(pulled)
    assert ".gitattributes" in got
    del got[".gitattributes"]
    assert got == contents(folder)
    assert pulled.name == commit.oid
    newest = api.list_repo_commits(repo)[0]
    assert (newest.title, newest.message, newest.authors) == ("all of it", "why", ["ada"])


def test_uploading_the_same_again_makes_no_commit(api: HfApi, repo: str, folder: Path) -> None:
    first = api.upload_folder(repo_id=repo, folder_path=folder)
    again = api.upload_folder(repo_id=repo, folder_path=folder)
    assert again.oid == first.oid
    assert len(api.list_repo_commits(repo)) == 2


def test_info_carries_the_card_as_tags_and_each_file(api: HfApi, repo: str, folder: Path) -> None:
    oid = api.upload_folder(repo_id=repo, folder_path=folder).oid
    info = api.model_info(repo, files_metadata=True)
    assert info.sha == oid
    assert info.library_name == "peft"
    assert info.pipeline_tag == "text-generation"
    assert {
        "orders",
        "lora",
        "en",
        "license:mit",
        "dataset:ada/rows",
        "base_model:some/base",
        "base_model:adapter:some/base",
        "safetensors",
    } <= set(info.tags)
    assert info.card_data.base_model == "some/base"
    weights = next(it for it in info.siblings if it.rfilename == "adapter_model.safetensors")
    assert weights.size == weights.lfs.size == 300_000
    assert len(weights.lfs.sha256) == 64
    readme = next(it for it in info.siblings if it.rfilename == "README.md")
    assert readme.size == len(CARD)
    assert readme.lfs is None


def test_tree_lists_folders_and_the_last_commit_of_each_entry(api: HfApi, repo: str, folder: Path) -> None:
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="first")
    api.upload_file(repo_id=repo, path_or_fileobj=b"new", path_in_repo="sub/new.txt", commit_message="second")
    tree = {it.path: it for it in api.list_repo_tree(repo, recursive=True, expand=True)}
    assert {"sub", "sub/deeper one", "sub/deeper one/ünï 100%#?.txt", "sub/no suffix"} <= set(tree)
    assert tree["sub/new.txt"].last_commit.title == "second"
    assert tree["sub"].last_commit.title == "second"
    assert tree["sub/deeper one"].last_commit.title == "first"
    assert tree[".gitattributes"].last_commit.title == "first"  # it got a line for "sub/no suffix"
    assert {it.path for it in api.list_repo_tree(repo)} == {
        ".gitattributes",
        "README.md",
        "adapter_model.safetensors",
        "empty.txt",
        "sub",
    }
    assert [it.path for it in api.list_repo_tree(repo, "sub/deeper one")] == ["sub/deeper one/ünï 100%#?.txt"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(repo, "nowhere"))


def test_long_listings_come_in_pages_of_one_commit(api: HfApi, repo: str) -> None:
    files = [CommitOperationAdd(f"d{n % 7}/{n:05}.txt", b"%d" % n) for n in range(1500)]
    api.create_commit(repo, files, commit_message="many")
    assert len(list(api.list_repo_tree(repo, recursive=True))) == 1500 + 7 + 1
    assert len(api.list_repo_files(repo)) == 1501


def test_paths_info_leaves_out_what_is_missing(api: HfApi, repo: str, folder: Path) -> None:
    api.upload_folder(repo_id=repo, folder_path=folder)
    found = api.get_paths_info(repo, ["README.md", "sub", "nothing/here"], expand=True)
    assert [it.path for it in found] == ["README.md", "sub"]
    assert found[0].last_commit.title
    assert api.file_exists(repo, "empty.txt")
    assert not api.file_exists(repo, "full.txt")


def test_one_commit_adds_copies_and_deletes(api: HfApi, repo: str, folder: Path) -> None:
    api.upload_folder(repo_id=repo, folder_path=folder)
    api.create_commit(
        repo,
        [
            CommitOperationAdd("a/b.txt", b"text"),
            CommitOperationCopy("adapter_model.safetensors", "copy.safetensors"),
            CommitOperationCopy("README.md", "COPY.md"),
            CommitOperationDelete("sub/", is_folder=True),
            CommitOperationDelete("empty.txt"),
        ],
        commit_message="all at once",
    )
    assert set(api.list_repo_files(repo)) == {
        ".gitattributes",
        "README.md",
        "COPY.md",
        "adapter_model.safetensors",
        "copy.safetensors",
        "a/b.txt",
    }
    info = {it.path: it for it in api.get_paths_info(repo, ["adapter_model.safetensors", "copy.safetensors"])}
    assert info["copy.safetensors"].lfs.sha256 == info["adapter_model.safetensors"].lfs.sha256


def test_a_failing_operation_leaves_nothing_of_its_commit(api: HfApi, repo: str) -> None:
    before = api.model_info(repo).sha
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(
            repo,
            [CommitOperationAdd("x.txt", b"x"), CommitOperationDelete("missing.txt")],
            commit_message="no",
        )
    with pytest.raises(BadRequestError, match="both a file and a folder"):
        api.create_commit(
            repo, [CommitOperationAdd("a", b"x"), CommitOperationAdd("a/b", b"y")], commit_message="no"
        )
    assert api.model_info(repo).sha == before
    assert api.list_repo_files(repo) == [".gitattributes"]


def test_a_stale_parent_commit_is_refused_and_named(api: HfApi, repo: str) -> None:
    base = api.model_info(repo).sha
    moved = api.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="1.txt", parent_commit=base).oid
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        api.upload_file(repo_id=repo, path_or_fileobj=b"2", path_in_repo="2.txt", parent_commit=base)
    assert status_of(refused) == 412
    assert moved in str(refused.value)
    assert "2.txt" not in api.list_repo_files(repo)


def test_tags_and_branches_are_made_once(api: HfApi, repo: str) -> None:
    first = api.model_info(repo).sha
    api.create_tag(repo, tag="v0.1.0")
    api.create_tag(repo, tag="v0.1.1", tag_message="annotated", revision=first)
    api.create_branch(repo, branch="dev/next")
    for again in (
        lambda: api.create_tag(repo, tag="v0.1.0"),
        lambda: api.create_tag(repo, tag="v0.1.1", tag_message="other"),
        lambda: api.create_branch(repo, branch="dev/next"),
        lambda: api.create_branch(repo, branch="v0.1.0"),
        lambda: api.create_tag(repo, tag="main"),
        lambda: api.create_branch(repo, branch="dev"),
    ):
        with pytest.raises(HfHubHTTPError) as refused:
            again()
        assert status_of(refused) == 409
    api.create_tag(repo, tag="v0.1.0", exist_ok=True)
    api.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="1.txt", revision="dev/next")
    refs = api.list_repo_refs(repo)
    assert {it.name: it.ref for it in refs.branches} == {
        "main": "refs/heads/main",
        "dev/next": "refs/heads/dev/next",
    }
    assert {it.name: it.target_commit for it in refs.tags} == {"v0.1.0": first, "v0.1.1": first}
    assert api.file_exists(repo, "1.txt", revision="dev/next")
    assert not api.file_exists(repo, "1.txt")
    api.delete_tag(repo, tag="v0.1.1")
    api.delete_branch(repo, branch="dev/next")
    refs = api.list_repo_refs(repo)
    assert [it.name for it in refs.tags] == ["v0.1.0"]
    assert [it.name for it in refs.branches] == ["main"]
    with pytest.raises(HfHubHTTPError):
        api.delete_branch(repo, branch="main")


def test_a_version_that_was_deleted_is_only_its_own_commits_again(api: HfApi, repo: str) -> None:
    first = api.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="1.txt").oid
    for tag in ("v1.0.0", "v1.0.0-rc.1+b", "best"):
        api.create_tag(repo, tag=tag, revision=first, tag_message="as tested")
        api.delete_tag(repo, tag=tag)
    later = api.upload_file(repo_id=repo, path_or_fileobj=b"2", path_in_repo="1.txt").oid
    api.super_squash_history(repo)
    for tag in ("v1.0.0", "v1.0.0-rc.1+b"):
        with pytest.raises(HfHubHTTPError, match="never used again") as refused:
            api.create_tag(repo, tag=tag, revision=later)
        assert status_of(refused) == 409
    api.create_tag(repo, tag="best", revision=later)
    api.create_tag(repo, tag="v1.0.0", revision=first)
    assert {it.name for it in api.list_repo_refs(repo).tags} == {"best", "v1.0.0"}


def test_missing_things_raise_the_exception_of_their_kind(api: HfApi, repo: str, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("ada/nothing-here")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("gpt2")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info(repo)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="v9")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="0" * 40)
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(repo, tag="v1", revision="v9")
    for revision, expected in (("main", RemoteEntryNotFoundError), ("v9", RevisionNotFoundError)):
        with pytest.raises(expected):
            hf_hub_download(repo, "x.bin", revision=revision, endpoint=api.endpoint, cache_dir=tmp_path)
    # The client remembers what a commit does not have: the answer must have named the commit.
    assert list(tmp_path.glob("**/.no_exist/*/x.bin"))


def test_any_revision_can_be_read(api: HfApi, repo: str, tmp_path: Path) -> None:
    one = api.upload_file(repo_id=repo, path_or_fileobj=b"one", path_in_repo="f.txt").oid
    api.create_tag(repo, tag="release/1")
    api.upload_file(repo_id=repo, path_or_fileobj=b"two", path_in_repo="f.txt")

    def read(revision: str) -> bytes:
        path = hf_hub_download(repo, "f.txt", revision=revision, endpoint=api.endpoint, cache_dir=tmp_path)
        return Path(path).read_bytes()

    assert [read(it) for it in ("main", "release/1", one, "refs/heads/main")] == [
        b"two",
        b"one",
        b"one",
        b"two",
    ]


def test_file_metadata_names_commit_digest_and_size(api: HfApi, repo: str) -> None:
    commit = api.upload_file(repo_id=repo, path_or_fileobj=b"\0" * 1000, path_in_repo="w.safetensors").oid
    info = api.get_paths_info(repo, ["w.safetensors"])[0]
    meta = get_hf_file_metadata(hf_hub_url(repo, "w.safetensors", endpoint=api.endpoint))
    assert (meta.commit_hash, meta.etag, meta.size) == (commit, info.lfs.sha256, 1000)
    assert meta.xet_file_data is None
    meta = get_hf_file_metadata(hf_hub_url(repo, ".gitattributes", endpoint=api.endpoint))
    assert meta.etag == api.get_paths_info(repo, [".gitattributes"])[0].blob_id


def test_pull_request_is_made_shown_commented_and_merged(api: HfApi, repo: str) -> None:
    proposed = api.create_commit(
        repo, [CommitOperationAdd("new.txt", b"new\n")], commit_message="Add new", create_pr=True
    )
    assert (proposed.pr_num, proposed.pr_revision) == (1, "refs/pr/1")
    assert not api.file_exists(repo, "new.txt")
    assert api.file_exists(repo, "new.txt", revision="refs/pr/1")
    api.upload_file(repo_id=repo, path_or_fileobj=b"2", path_in_repo="2.txt", revision="refs/pr/1")
    api.upload_file(repo_id=repo, path_or_fileobj=b"m", path_in_repo="on-main.txt")
    api.comment_discussion(repo, 1, "looks <b>good</b>")
    details = api.get_discussion_details(repo, 1)
    assert details.is_pull_request
    assert details.target_branch == "refs/heads/main"
    assert details.conflicting_files == []
    assert "+new" in details.diff
    assert details.events[-1].content == "looks <b>good</b>"
    assert [it.name for it in api.list_repo_refs(repo, include_pull_requests=True).pull_requests] == [
        "refs/pr/1"
    ]
    api.merge_pull_request(repo, 1, comment="thanks")
    assert set(api.list_repo_files(repo)) == {".gitattributes", "new.txt", "2.txt", "on-main.txt"}
    merged = api.get_discussion_details(repo, 1)
    assert merged.status == "merged"
    assert merged.merge_commit_oid == api.model_info(repo).sha
    with pytest.raises(BadRequestError):
        api.merge_pull_request(repo, 1)


def test_a_conflicting_pull_request_is_not_merged(api: HfApi, repo: str) -> None:
    api.create_commit(repo, [CommitOperationAdd("f.txt", b"theirs")], commit_message="theirs", create_pr=True)
    head = api.upload_file(repo_id=repo, path_or_fileobj=b"ours", path_in_repo="f.txt").oid
    assert api.get_discussion_details(repo, 1).conflicting_files == ["f.txt"]
    with pytest.raises(HfHubHTTPError) as refused:
        api.merge_pull_request(repo, 1)
    assert status_of(refused) == 409
    assert api.model_info(repo).sha == head


def test_discussions_are_listed_renamed_and_closed(api: HfApi, repo: str) -> None:
    api.create_discussion(repo, "A question", description="why?")
    draft = api.create_pull_request(repo, "A draft")
    assert draft.status == "draft"
    api.rename_discussion(repo, 1, "A better question")
    api.change_discussion_status(repo, 1, "closed", comment="answered")
    listed = {it.num: (it.title, it.status, it.is_pull_request) for it in api.get_repo_discussions(repo)}
    assert listed == {1: ("A better question", "closed", False), 2: ("A draft", "draft", True)}
    assert [it.num for it in api.get_repo_discussions(repo, discussion_type="pull_request")] == [2]
    with pytest.raises(HfHubHTTPError):
        api.get_discussion_details(repo, 3)


def test_super_squash_keeps_files_and_tags(api: HfApi, repo: str) -> None:
    api.upload_file(repo_id=repo, path_or_fileobj=b"1", path_in_repo="1.txt")
    api.create_tag(repo, tag="v1")
    api.upload_file(repo_id=repo, path_or_fileobj=b"2", path_in_repo="2.txt")
    files = api.list_repo_files(repo)
    api.super_squash_history(repo, commit_message="squashed")
    assert [it.title for it in api.list_repo_commits(repo)] == ["squashed"]
    assert api.list_repo_files(repo) == files
    assert len(api.list_repo_commits(repo, revision="v1")) == 2


def test_create_exist_ok_move_and_delete(api: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo(repo)
    assert status_of(refused) == 409
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    sha = api.upload_file(repo_id=repo, path_or_fileobj=b"\0\1", path_in_repo="w.bin").oid
    other = f"{repo}-moved"
    api.create_repo(f"{repo}-taken")
    with pytest.raises(HfHubHTTPError):
        api.move_repo(repo, f"{repo}-taken")
    api.move_repo(repo, other)
    assert api.model_info(other).sha == sha
    assert not api.repo_exists(repo)
    api.delete_repo(other)
    assert not api.repo_exists(other)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(other)
    api.delete_repo(other, missing_ok=True)
    assert api.create_repo(repo).repo_id == repo


def test_models_and_datasets_of_one_name_are_apart(api: HfApi, repo: str, tmp_path: Path) -> None:
    url = api.create_repo(repo, repo_type="dataset")
    assert (url.repo_type, url.repo_id) == ("dataset", repo)
    api.upload_file(
        repo_id=repo, repo_type="dataset", path_or_fileobj=b"\0" * 50, path_in_repo="rows.parquet"
    )
    assert api.list_repo_files(repo) == [".gitattributes"]
    path = hf_hub_download(
        repo, "rows.parquet", repo_type="dataset", endpoint=api.endpoint, cache_dir=tmp_path
    )
    assert Path(path).read_bytes() == b"\0" * 50
    assert [it.id for it in api.list_datasets(author="ada", search=repo.split("/")[1])] == [repo]


def test_private_repositories_are_hidden_from_strangers(api: HfApi, repo: str, tmp_path: Path) -> None:
    stranger = HfApi(endpoint=api.endpoint, token=False)
    api.upload_file(repo_id=repo, path_or_fileobj=b"s", path_in_repo="s.txt")
    assert stranger.model_info(repo).private is False
    api.update_repo_settings(repo, private=True)
    assert api.model_info(repo).private is True
    name = repo.split("/")[1]
    assert repo not in [it.id for it in stranger.list_models(search=name)]
    assert repo in [it.id for it in api.list_models(search=name)]
    for call in (
        lambda: stranger.model_info(repo),
        lambda: stranger.list_repo_refs(repo),
        lambda: list(stranger.list_repo_tree(repo)),
        lambda: stranger.get_paths_info(repo, ["s.txt"]),
        lambda: stranger.hf_hub_download(repo, "s.txt", cache_dir=tmp_path),
        lambda: stranger.snapshot_download(repo, cache_dir=tmp_path),
        lambda: stranger.delete_repo(repo),
    ):
        with pytest.raises(RepositoryNotFoundError):
            call()
    assert Path(api.hf_hub_download(repo, "s.txt", cache_dir=tmp_path)).read_bytes() == b"s"
    api.create_repo(f"{repo}-p", private=True)
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info(f"{repo}-p")


def test_gated_files_need_a_grant(api: HfApi, repo: str, tmp_path: Path) -> None:
    api.upload_file(repo_id=repo, path_or_fileobj=b"s", path_in_repo="s.txt")
    api.update_repo_settings(repo, gated="manual")
    stranger = HfApi(endpoint=api.endpoint, token=False)
    assert stranger.model_info(repo).gated == "manual"
    with pytest.raises(GatedRepoError):
        stranger.hf_hub_download(repo, "s.txt", cache_dir=tmp_path)
    with pytest.raises(GatedRepoError):
        stranger.auth_check(repo)
    api.auth_check(repo, write=True)
    api.grant_access(repo, "bob")


def test_a_wrong_token_is_refused_and_says_so(hub_server, repo: str) -> None:
    wrong = HfApi(endpoint=hub_server.url, token="not-the-token")
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as refused:
        wrong.whoami()
    assert status_of(refused) == 401
    with pytest.raises(HfHubHTTPError) as refused:
        wrong.model_info(repo)
    assert status_of(refused) == 401
    assert not isinstance(refused.value, RepositoryNotFoundError)


def test_writing_outside_ones_namespace_is_forbidden(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="may not write") as refused:
        api.create_repo("somebody-else/x")
    assert status_of(refused) == 403


def test_gitignore_is_kept_to(api: HfApi, repo: str, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / "skipped.log").write_text("skipped")
    (tmp_path / ".gitignore").write_text("*.log\n")
    api.upload_folder(repo_id=repo, folder_path=tmp_path)
    assert set(api.list_repo_files(repo)) == {".gitattributes", ".gitignore", "kept.txt"}


def test_a_bad_card_is_refused_before_anything_is_sent(api: HfApi, repo: str) -> None:
    for bad in (b"license: [", b"license: [mit]", b"a: &x 1\nb: *x"):
        with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
            api.upload_file(
                repo_id=repo, path_or_fileobj=b"---\n" + bad + b"\n---\n", path_in_repo="README.md"
            )
    assert api.list_repo_files(repo) == [".gitattributes"]


def test_file_objects_upload_even_with_xet_installed(
    api: HfApi, repo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    data = os.urandom(50_000)
    api.upload_file(repo_id=repo, path_or_fileobj=io.BytesIO(data), path_in_repo="w.bin")
    assert Path(api.hf_hub_download(repo, "w.bin", cache_dir=tmp_path)).read_bytes() == data


@pytest.mark.slow
def test_hf_command_line(hub_server, folder: Path, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "HF_ENDPOINT": hub_server.url,
        "HF_TOKEN": hub_server.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    hf = Path(sys.executable).with_name("hf")

    def run(*args: object) -> str:
        done = subprocess.run([hf, *map(str, args)], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "ada" in run("auth", "whoami")
    run("repos", "create", "ada/from-hf")
    run("upload", "ada/from-hf", folder, ".", "--commit-message", "by hf")
    run("repos", "tag", "create", "ada/from-hf", "v1.0.0")
    run("download", "ada/from-hf", "--revision", "v1.0.0", "--local-dir", tmp_path / "down")
    got = {
        path: data
        for path, data in contents(tmp_path / "down").items()
        if not path.startswith((".cache", ".git"))
    }
    assert got == contents(folder)


@pytest.mark.slow
def test_transformers_and_peft_load_from_it(
    api: HfApi, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    api.create_repo("ada/tiny-base", private=True)
    api.create_repo("ada/tiny-adapter")
    api.upload_folder(repo_id="ada/tiny-base", folder_path=tiny_base)
    api.upload_folder(repo_id="ada/tiny-adapter", folder_path=tiny_adapter)
    program = (
        "import torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained('ada/tiny-base')\n"
        "base = AutoModelForCausalLM.from_pretrained('ada/tiny-base')\n"
        "model = PeftModel.from_pretrained(base, 'ada/tiny-adapter')\n"
        "ids = tokenizer('Two apples', return_tensors='pt').input_ids\n"
        "print('logits', tuple(model(input_ids=ids).logits.shape)[0])\n"
    )
    env = {**os.environ, "HF_ENDPOINT": api.endpoint, "HF_TOKEN": str(api.token), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=240
    )
    assert "logits 1" in done.stdout, done.stderr
