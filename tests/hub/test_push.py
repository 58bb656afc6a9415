"""Pushing releases to a real Hub: one commit, one tag, and nothing that moves a version."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import get_session

from adapterhub.errors import (
    AdapterHubError,
    AuthError,
    ConflictError,
    HubError,
    RefError,
    ReleaseError,
    SignatureError,
    VersionError,
)
from adapterhub.hub import push as push_module
from adapterhub.hub import uploads
from adapterhub.hub.pull import pull
from adapterhub.hub.push import Delivery, push
from adapterhub.packaging.files import list_files
from adapterhub.packaging.keys import generate_key, trust_key
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.release import Release
from adapterhub.packaging.signing import sign_release


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses; the repository is not made."""
    return f"ada/push-{sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture
def api(hub_server) -> HfApi:
    return HfApi(endpoint=hub_server.url, token=hub_server.token)


@pytest.fixture
def send(hub_server) -> Callable[..., push_module.Pushed]:
    """``send(folder, repo, …)`` pushes as ada."""

    def run(folder: Path, repo: str, **options) -> push_module.Pushed:
        options.setdefault("token", hub_server.token)
        return push(Release.open(folder), repo, endpoint=hub_server.url, **options)

    return run


@pytest.fixture
def version_of(tiny_release: Path, tmp_path: Path) -> Callable[[str], Path]:
    """``version_of("1.2.0")`` -> a copy of the tiny release with that version."""

    def run(version: str) -> Path:
        path = tmp_path / f"release-{version}"
        shutil.copytree(tiny_release, path)
        manifest = Manifest.read(path).model_copy(update={"version": version})
        (path / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        return path

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in list_files(folder)}


def tags(api: HfApi, repo: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}


def commits(api: HfApi, repo: str) -> int:
    return len(api.list_repo_commits(repo))


def test_a_pushed_release_comes_back_byte_for_byte(hub_server, api, send, repo, tiny_release) -> None:
    pushed = send(tiny_release, repo)
    assert (pushed.outcome, pushed.tag, pushed.kept) == ("pushed", "v0.1.0", ())
    assert {it.change for it in pushed.files} == {"new"}
    assert tags(api, repo) == {"v0.1.0": pushed.commit}
    assert api.list_repo_commits(repo)[0].title == "Release tiny-orders 0.1.0"
    assert commits(api, repo) == 2  # the Hub's own first one, and ours
    pulled = pull(repo, endpoint=hub_server.url)
    assert contents(pulled.release.path) == contents(tiny_release)
    assert (pulled.commit, pulled.tag, pulled.signer) == (pushed.commit, "v0.1.0", None)


def test_the_same_release_again_changes_nothing(api, send, repo, tiny_release) -> None:
    first = send(tiny_release, repo)
    again = send(tiny_release, repo)
    assert (again.outcome, again.commit, again.url) == ("already there", first.commit, first.url)
    assert commits(api, repo) == 2


def test_a_push_cut_off_before_the_tag_is_completed(api, send, repo, tiny_release) -> None:
    first = send(tiny_release, repo)
    api.delete_tag(repo, tag="v0.1.0")
    again = send(tiny_release, repo)
    assert (again.outcome, again.commit) == ("tagged", first.commit)
    assert tags(api, repo) == {"v0.1.0": first.commit}
    assert commits(api, repo) == 2


def test_a_new_version_sends_what_changed_and_deletes_what_went(api, send, repo, version_of) -> None:
    old, new = version_of("1.0.0"), version_of("1.1.0")
    Release.open(old).with_files({"evidence/old.json": b"{}", "evidence/kept.json": b"[1]"})
    Release.open(new).with_files({"evidence/new.json": b"{}", "evidence/kept.json": b"[1]"})
    first = send(old, repo)
    second = send(new, repo)
    change = {it.name: it.change for it in second.files}
    assert change["evidence/old.json"] == "deleted"
    assert change["evidence/new.json"] == "new"
    assert change["evidence/kept.json"] == change["adapter_model.safetensors"] == "unchanged"
    assert change[MANIFEST_NAME] == "changed"
    assert tags(api, repo) == {"v1.0.0": first.commit, "v1.1.0": second.commit}
    assert set(api.list_repo_files(repo)) == {".gitattributes", *list_files(new)}
    assert "evidence/old.json" in api.list_repo_files(repo, revision="v1.0.0")


def test_a_version_never_gets_other_content(api, send, repo, tiny_release) -> None:
    first = send(tiny_release, repo)
    Release.open(tiny_release).with_files({"evidence/more.json": b"{}"})
    with pytest.raises(VersionError, match=r"v0\.1\.0 is there with other content") as error:
        send(tiny_release, repo)
    assert "above 0.1.0" in error.value.fix
    assert tags(api, repo) == {"v0.1.0": first.commit}
    assert commits(api, repo) == 2


@pytest.mark.parametrize("branch", ["main", "dev"])
def test_a_version_whose_tag_was_deleted_is_not_free(
    hub_server, api, send, repo, tiny_release, tmp_path, branch
) -> None:
    """On a Hub that lets its owner tag anything, as on ours."""
    changed = shutil.copytree(tiny_release, tmp_path / "changed")
    Release.open(changed).with_files({"evidence/more.json": b"{}"})
    first = send(tiny_release, repo)
    send(tiny_release, repo, delivery=Delivery(branch=branch))
    api.delete_tag(repo, tag="v0.1.0")
    with pytest.raises(VersionError, match=r"had other content as 0\.1\.0 at commit") as error:
        send(changed, repo, delivery=Delivery(branch=branch))
    assert "above 0.1.0" in error.value.fix
    assert (tags(api, repo), commits(api, repo)) == ({}, 2)
    assert send(tiny_release, repo).outcome == "tagged"
    assert tags(api, repo) == {"v0.1.0": first.commit}


def test_a_version_whose_tag_was_deleted_gets_no_other_signatures(
    api, send, repo, tiny_release, tmp_path
) -> None:
    first, before = send(tiny_release, repo), shutil.copytree(tiny_release, tmp_path / "unsigned")
    api.delete_tag(repo, tag="v0.1.0")
    sign_release(tiny_release, generate_key(tmp_path / "keys").private)
    with pytest.raises(VersionError, match=r"had other signatures as 0\.1\.0 at commit") as error:
        send(tiny_release, repo)
    assert f"adapterhub pull {repo}@{first.commit} --out" in error.value.fix
    assert (tags(api, repo), commits(api, repo)) == ({}, 2)
    api.upload_file(repo_id=repo, path_or_fileobj=b"[]", path_in_repo="evidence/scores.json")
    assert send(before, repo, dry_run=True).commit == first.commit
    assert send(before, repo).outcome == "tagged"
    assert tags(api, repo) == {"v0.1.0": first.commit}


def test_a_version_that_the_hub_alone_remembers_is_said(api, send, repo, tiny_release) -> None:
    send(tiny_release, repo)
    api.delete_tag(repo, tag="v0.1.0")
    api.super_squash_history(repo)
    Release.open(tiny_release).with_files({"evidence/more.json": b"{}"})
    with pytest.raises(VersionError, match=r"v0\.1\.0 was the version of commit \w+") as error:
        send(tiny_release, repo)
    assert "above 0.1.0" in error.value.fix
    assert tags(api, repo) == {}


@pytest.mark.parametrize(
    ("there", "pushed", "accepted"),
    [
        (["1.0.0"], "0.9.0", False),
        (["1.0.0"], "1.0.0-rc.1", False),
        (["1.0.0-rc.1"], "1.0.0", True),
        (["1.0.0"], "2.0.0-a.1", True),
        (["1.0.0", "1.0.1", "1.1.0"], "1.0.2", True),
        (["1.0.0", "1.0.2", "1.1.0"], "1.0.1", False),
        (["1.0.0", "1.10.0"], "1.9.0", False),
        (["1.9.0"], "1.10.0", True),
    ],
)
def test_versions_go_up_in_their_line(send, repo, version_of, there, pushed, accepted) -> None:
    for version in there:
        send(version_of(version), repo)
    with contextlib.nullcontext() if accepted else pytest.raises(VersionError, match="is below"):
        send(version_of(pushed), repo)


def test_what_others_put_there_is_left_alone(api, send, repo, tiny_release, version_of) -> None:
    api.create_repo(repo)
    api.upload_file(repo_id=repo, path_or_fileobj=b"MIT", path_in_repo="LICENSE")
    api.upload_file(repo_id=repo, path_or_fileobj=b"{}", path_in_repo="adapter_config.json")
    pushed = send(tiny_release, repo)
    assert pushed.kept == ("LICENSE",)
    assert {it.name: it.change for it in pushed.files}["adapter_config.json"] == "changed"
    assert "LICENSE" in api.list_repo_files(repo)
    assert send(version_of("0.2.0"), repo).kept == ("LICENSE",)


def test_a_manifest_nobody_can_read_is_replaced_and_deletes_nothing(api, send, repo, tiny_release) -> None:
    api.create_repo(repo)
    for name in (MANIFEST_NAME, "other.json"):
        api.upload_file(repo_id=repo, path_or_fileobj=b'{"files": ["other.json"]}', path_in_repo=name)
    assert send(tiny_release, repo).kept == ("other.json",)


def test_a_dry_run_says_what_would_be_sent_and_makes_nothing(api, send, repo, tiny_release) -> None:
    dry = send(tiny_release, repo, dry_run=True)
    assert (dry.outcome, dry.commit) == ("dry run", None)
    assert {it.name: it.size for it in dry.files} == {
        name: (tiny_release / name).stat().st_size for name in list_files(tiny_release)
    }
    assert not api.repo_exists(repo)
    send(tiny_release, repo)
    assert {it.change for it in send(tiny_release, repo, dry_run=True).files} == {"unchanged"}


def test_a_private_repository_stays_so(hub_server, api, send, repo, tiny_release, version_of) -> None:
    send(tiny_release, repo, delivery=Delivery(private=True))
    assert api.model_info(repo).private
    send(version_of("0.2.0"), repo)
    assert api.model_info(repo).private
    with pytest.raises(RefError, match="no public repository"):
        pull(repo, endpoint=hub_server.url)
    assert pull(repo, endpoint=hub_server.url, token=hub_server.token).tag == "v0.2.0"


def test_private_is_not_claimed_of_a_public_repository(api, send, repo, tiny_release) -> None:
    api.create_repo(repo)
    with pytest.raises(HubError, match="everybody can read it"):
        send(tiny_release, repo, delivery=Delivery(private=True))
    assert commits(api, repo) == 1


def test_tokens_that_may_not_write(hub_server, api, send, repo, tiny_release) -> None:
    added = subprocess.run(
        [
            sys.executable, "-m", "adapterhub", "hub", "token", "add", str(hub_server.root),
            "--user", "ada", "--role", "read",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    reader = added.stdout.strip()
    with pytest.raises(AuthError, match="does not know the token"):
        send(tiny_release, repo, token="wrong")
    with pytest.raises(AuthError, match="needs a token, and none was sent"):
        send(tiny_release, repo, token=None)
    with pytest.raises(AuthError, match="may not"):
        send(tiny_release, repo, token=reader)
    api.create_repo(repo)
    with pytest.raises(AuthError, match="may not"):
        send(tiny_release, repo, token=reader)
    with pytest.raises(AuthError, match="may not"):
        send(tiny_release, "grace/orders")
    assert commits(api, repo) == 1


def test_a_broken_release_is_not_sent(api, send, repo, tiny_release, tmp_path) -> None:
    pair = generate_key(tmp_path / "keys")
    trust_key(pair.public)
    sign_release(tiny_release, pair.private)
    manifest = (tiny_release / MANIFEST_NAME).read_bytes()
    (tiny_release / MANIFEST_NAME).write_bytes(manifest.replace(b"an order", b"no order"))
    with pytest.raises(SignatureError):  # the files are as listed, but the signature covers another manifest
        send(tiny_release, repo)
    (tiny_release / MANIFEST_NAME).write_bytes(manifest)
    (tiny_release / "adapter_config.json").write_text("{}")
    with pytest.raises(SignatureError, match=r"adapter_config\.json"):
        send(tiny_release, repo)
    assert not api.repo_exists(repo)


def test_a_card_that_the_hub_refuses_is_explained(api, send, repo, tiny_release) -> None:
    Release.open(tiny_release).with_files({"README.md": b"---\nlicense: [unclosed\n---\n"})
    with pytest.raises(ReleaseError, match=r"metadata of README\.md") as error:
        send(tiny_release, repo)
    assert "adapterhub card" in error.value.fix
    assert commits(api, repo) == 1
    assert tags(api, repo) == {}


@pytest.mark.parametrize("name", ["orders", "ada/../x", "ada/orders@v1.0.0"])
def test_what_is_no_repository_is_refused(send, tiny_release, name) -> None:
    with pytest.raises(RefError):
        send(tiny_release, name)


def test_a_branch_moved_meanwhile_is_a_conflict(api, send, repo, version_of, monkeypatch) -> None:
    send(version_of("1.0.0"), repo)
    real = push_module.commit_files

    def after_somebody_else(*args, **options):
        api.upload_file(repo_id=repo, path_or_fileobj=b"theirs", path_in_repo="theirs.txt")
        return real(*args, **options)

    monkeypatch.setattr(push_module, "commit_files", after_somebody_else)
    with pytest.raises(ConflictError, match=f"{repo}: ada moved main meanwhile, .*Upload theirs.txt"):
        send(version_of("1.1.0"), repo)
    assert set(tags(api, repo)) == {"v1.0.0"}
    assert "theirs.txt" in api.list_repo_files(repo)


def test_a_version_taken_meanwhile_is_a_conflict_and_says_where_the_files_are(
    api, send, repo, version_of, monkeypatch
) -> None:
    first = send(version_of("1.0.0"), repo)
    real = push_module.commit_files

    def then_somebody_tags(*args, **options):
        made = real(*args, **options)
        api.create_tag(repo, tag="v1.1.0", revision=first.commit)
        return made

    monkeypatch.setattr(push_module, "commit_files", then_somebody_tags)
    with pytest.raises(ConflictError, match=r"took v1\.1\.0 meanwhile"):
        send(version_of("1.1.0"), repo)
    assert tags(api, repo)["v1.1.0"] == first.commit


def test_pushes_at_the_same_time_lose_nothing(api, send, repo, version_of) -> None:
    send(version_of("1.0.0"), repo)
    folders = {version: version_of(version) for version in ("1.1.0", "1.2.0", "1.3.0")}
    for version, folder in folders.items():
        Release.open(folder).with_files({f"evidence/{version}.json": b"{}"})
    done: dict[str, str | None] = {}

    def one(version: str) -> None:
        with contextlib.suppress(ConflictError, VersionError):
            done[version] = send(folders[version], repo).commit

    threads = [threading.Thread(target=one, args=(version,)) for version in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done, "one of them wins"
    found = tags(api, repo)
    assert {f"v{version}": commit for version, commit in done.items()}.items() <= found.items()
    assert len(found) == len(done) + 1
    for version in done:
        assert f"evidence/{version}.json" in api.list_repo_files(repo, revision=f"v{version}")


def test_a_branch_of_its_own_is_made_and_tagged(api, send, repo, version_of) -> None:
    main = send(version_of("1.1.0"), repo).commit
    pushed = send(version_of("1.0.0"), repo.replace("/", "/fresh-"), delivery=Delivery(branch="old/line"))
    assert pushed.outcome == "pushed"
    pushed = send(version_of("2.0.0"), repo, delivery=Delivery(branch="next", message="A new line"))
    branches = {it.name: it.target_commit for it in api.list_repo_refs(repo).branches}
    assert branches == {"main": main, "next": pushed.commit}
    assert tags(api, repo)["v2.0.0"] == pushed.commit
    assert api.list_repo_commits(repo, revision="next")[0].title == "A new line"


def test_a_pull_request_gets_its_tag_once_it_is_merged(api, send, repo, version_of) -> None:
    first = send(version_of("1.0.0"), repo).commit
    newer, proposing = version_of("1.1.0"), Delivery(as_pull_request=True)
    proposed = send(newer, repo, delivery=proposing)
    assert proposed.outcome == "proposed"
    assert proposed.url.endswith(f"/{repo}/discussions/1")
    for options in ({}, {"dry_run": True}, {"delivery": Delivery(as_pull_request=True, message="Again")}):
        again = send(newer, repo, **{"delivery": proposing} | options)
        assert (again.outcome, again.commit, again.url) == ("proposed before", proposed.commit, proposed.url)
    elsewhere = Delivery("next", as_pull_request=True)
    api.create_branch(repo, branch="next")
    assert send(newer, repo, delivery=elsewhere).url.endswith(f"/{repo}/discussions/2")
    assert set(tags(api, repo)) == {"v1.0.0"}
    assert api.model_info(repo).sha == first
    api.merge_pull_request(repo, 1)
    assert send(newer, repo).outcome == "tagged"
    assert tags(api, repo)["v1.1.0"] == api.model_info(repo).sha


@pytest.mark.parametrize(
    "delivery",
    [Delivery(as_pull_request=True), Delivery(branch="v1.0.0"), Delivery(branch="a" * 40), Delivery("a b")],
)
def test_what_is_no_branch_to_go_to_is_said(send, repo, tiny_release, delivery) -> None:
    with pytest.raises(RefError):
        send(tiny_release, f"{repo}-never-made", delivery=delivery)


@pytest.mark.parametrize(
    ("offer", "taken"),
    [("https://cas.example.org", True), ("local:///tmp/elsewhere", False), (None, False)],
)
def test_xet_is_asked_for_and_never_writes_where_a_hub_says(tmp_path, monkeypatch, offer, taken) -> None:
    (tmp_path / "large.bin").write_bytes(bytes(2 << 20))
    seen, asked = [], []

    def answer(url: str, **_: object) -> httpx2.Response:
        asked.append(url)
        return httpx2.Response(200 if offer else 404, headers={"X-Xet-Cas-Url": offer or ""})

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(get_session(), "get", answer)
    monkeypatch.setattr(HfApi, "create_commit", lambda self, repo, operations, **_: seen.extend(operations))
    api, add = HfApi(endpoint="http://127.0.0.1:9"), {"large.bin": tmp_path / "large.bin"}
    uploads.commit_files(api, "a/b", add, (), message="m", description="", parent="0" * 40, branch="x/y")
    assert asked == ["http://127.0.0.1:9/api/models/a/b/xet-write-token/x%2Fy"]
    assert isinstance(seen[0].path_or_fileobj, str) is taken  # only paths go through Xet


def test_large_files_go_by_lfs_to_a_hub_of_ones_own(send, repo, tiny_release, monkeypatch, caplog) -> None:
    import huggingface_hub._commit_api as commit_api

    def refused(**_: object) -> None:
        raise AssertionError("Xet was used")

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(commit_api, "_upload_xet_files", refused)
    assert commit_api.is_xet_available()
    assert send(tiny_release, repo).outcome == "pushed"
    assert "Xet" not in caplog.text


def test_the_public_hub_gets_large_files_as_huggingface_hub_likes_it(tmp_path, monkeypatch) -> None:
    """Which of the two ways is taken there is huggingface_hub's own choice: it gets paths."""
    (tmp_path / "x.bin").write_bytes(b"x")
    seen = []
    monkeypatch.setattr(HfApi, "create_commit", lambda self, repo, operations, **_: seen.extend(operations))
    uploads.commit_files(
        HfApi(endpoint="https://huggingface.co"),
        "a/b",
        {"x.bin": tmp_path / "x.bin"},
        (),
        message="m",
        description="",
        parent="0" * 40,
    )
    assert seen[0].path_or_fileobj == str(tmp_path / "x.bin")


@pytest.mark.parametrize("disabled", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_the_round_trip_with_and_without_hf_xet(hub_server, repo, carded_release, tmp_path, disabled) -> None:
    environment = {
        **os.environ, "HF_HUB_DISABLE_XET": disabled, "HF_ENDPOINT": hub_server.url,
        "HF_TOKEN": hub_server.token, "HF_HOME": str(tmp_path / "home"), "ADAPTERHUB_TRACEBACK": "1",
    }  # fmt: skip

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "adapterhub", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    pushed = run("push", str(carded_release), repo)
    pulled = run("pull", f"{repo}@v0.1.0")
    assert contents(Path(pulled.stdout.strip())) == contents(carded_release)
    assert "Xet" not in pushed.stderr + pulled.stderr


def test_a_hub_that_is_not_there_or_does_not_answer(tiny_release, monkeypatch) -> None:
    import socket

    from adapterhub.hub import client

    with pytest.raises(HubError, match="no answer from"):
        push(Release.open(tiny_release), "ada/orders", endpoint="http://127.0.0.1:9", token="x")
    monkeypatch.setattr(client, "_FIRST_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(HubError, match="no answer from") as error:
            push(Release.open(tiny_release), "ada/orders", endpoint=address, token="x")
    assert "check the network" in error.value.fix


@pytest.mark.slow
def test_a_hub_that_dies_in_the_middle_of_an_upload(start_hub, tiny_release, tmp_path, monkeypatch) -> None:
    import time

    import huggingface_hub.lfs as lfs

    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits up to 8 s between its tries
    release = Release.open(tiny_release)
    real = lfs._upload_single_part
    with start_hub(tmp_path / "hub") as server:

        def while_it_dies(*args, **options):
            server.process.kill()
            server.process.wait()
            return real(*args, **options)

        monkeypatch.setattr(lfs, "_upload_single_part", while_it_dies)
        with pytest.raises(HubError, match="no answer from"):
            push(release, "ada/orders", endpoint=server.url, token=server.token)
    monkeypatch.setattr(lfs, "_upload_single_part", real)
    with start_hub(tmp_path / "hub") as server:
        api = HfApi(endpoint=server.url, token=server.token)
        assert commits(api, "ada/orders") == 1
        assert tags(api, "ada/orders") == {}
        assert push(release, "ada/orders", endpoint=server.url, token=server.token).outcome == "pushed"
        assert contents(pull("ada/orders", endpoint=server.url).release.path) == contents(tiny_release)


def test_what_was_checked_is_sent_whatever_is_written_meanwhile(
    api, send, repo, tiny_release, monkeypatch
) -> None:
    real, checked = push_module.commit_files, contents(tiny_release)

    def while_it_changes(*args, **options):
        (tiny_release / "adapter_config.json").write_text("{}")
        return real(*args, **options)

    monkeypatch.setattr(push_module, "commit_files", while_it_changes)
    send(tiny_release, repo)
    assert contents(pull(repo, endpoint=api.endpoint).release.path) == checked


def test_a_large_file_changed_while_it_was_sent_gets_no_version(
    api, send, repo, tiny_release, monkeypatch
) -> None:
    Release.open(tiny_release).with_files({"evidence/long.json": b" " * (2 << 20)})
    real = push_module.commit_files

    def while_it_changes(*args, **options):
        (tiny_release / "evidence/long.json").write_bytes(b"x" * (2 << 20))
        return real(*args, **options)

    monkeypatch.setattr(push_module, "commit_files", while_it_changes)
    with pytest.raises(AdapterHubError):
        send(tiny_release, repo)
    assert tags(api, repo) == {}
