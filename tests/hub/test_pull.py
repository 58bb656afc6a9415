"""Pulling releases from a real Hub: which one, every file checked, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from adapterhub.errors import (
    AdapterHubWarning,
    AuthError,
    HubError,
    ManifestError,
    RefError,
    ReleaseError,
    SignatureError,
)
from adapterhub.hub import downloads
from adapterhub.hub.client import offline
from adapterhub.hub.pull import Pulled, pull
from adapterhub.hub.push import Delivery, push
from adapterhub.packaging.files import list_files
from adapterhub.packaging.keys import KeyPair, generate_key, trust_key
from adapterhub.packaging.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from adapterhub.packaging.release import Release
from adapterhub.packaging.signing import sign_release

DEAD = "http://127.0.0.1:9"


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses; the repository is not made."""
    return f"ada/pull-{sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture
def api(hub_server) -> HfApi:
    return HfApi(endpoint=hub_server.url, token=hub_server.token)


@pytest.fixture
def publish(hub_server, repo: str, tiny_release: Path, tmp_path: Path, hub_cache: Path) -> Callable[..., str]:
    """``publish("1.2.0", "1.3.0")`` pushes the tiny release in these versions -> the last commit.

    ``evidence/version.json`` tells them apart; ``key`` signs them. The cache is empty afterwards.
    """

    def run(*versions: str, key: Path | None = None, private: bool = False) -> str:
        commit = None
        for version in versions or ("0.1.0",):
            path = tmp_path / f"release-{version}"
            shutil.copytree(tiny_release, path)
            manifest = Manifest.read(path).model_copy(update={"version": version})
            (path / MANIFEST_NAME).write_bytes(manifest.to_bytes())
            Release.open(path).with_files({"evidence/version.json": json.dumps(version).encode()})
            if key is not None:
                sign_release(path, key)
            release = Release.open(path)
            commit = push(
                release,
                repo,
                endpoint=hub_server.url,
                token=hub_server.token,
                delivery=Delivery(private=private),
            ).commit
        shutil.rmtree(hub_cache, ignore_errors=True)
        assert commit is not None
        return commit

    return run


@pytest.fixture
def get(hub_server) -> Callable[..., Pulled]:
    """``get(ref, …)`` pulls from the test's Hub, without a token."""

    def run(ref: str, **options) -> Pulled:
        options.setdefault("endpoint", hub_server.url)
        return pull(ref, **options)

    return run


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return generate_key(tmp_path / "keys")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in list_files(folder)}


@pytest.mark.parametrize(
    ("versions", "newest"),
    [
        (["0.9.0", "0.10.0"], "0.10.0"),
        (["1.0.0", "2.0.0-rc.1"], "1.0.0"),
        (["1.0.0-a.1", "1.0.0-rc.1"], "1.0.0-rc.1"),
        (["1.0.0", "1.1.0", "1.0.1"], "1.1.0"),
    ],
)
def test_without_a_revision_the_highest_version_is_taken(api, publish, get, repo, versions, newest) -> None:
    publish(*versions)
    api.create_tag(repo, tag="v99", revision="main")
    api.create_tag(repo, tag="99.0.0", revision="main")
    pulled = get(repo)
    assert (pulled.tag, pulled.release.manifest.version) == (f"v{newest}", newest)


def test_without_versions_the_main_branch_is_taken(api, publish, get, repo) -> None:
    commit = publish("0.1.0")
    api.delete_tag(repo, tag="v0.1.0")
    pulled = get(repo)
    assert (pulled.commit, pulled.tag) == (commit, None)


def test_latest_is_the_highest_version_or_an_error(api, publish, get, repo) -> None:
    publish("0.9.0", "0.10.0")
    api.create_branch(repo, branch="latest", revision="v0.9.0")
    assert get(f"{repo}@latest").tag == "v0.10.0"
    api.delete_tag(repo, tag="v0.9.0")
    api.delete_tag(repo, tag="v0.10.0")
    with pytest.raises(RefError, match="no version yet"):
        get(f"{repo}@latest")


def test_only_the_adapter_and_then_the_rest(publish, get, repo, keys, hub_cache, tmp_path) -> None:
    publish("0.1.0", key=keys.private)
    part = get(repo, only="adapter", keys=[keys.public], out=tmp_path / "part")
    assert part.signer is not None
    assert "evidence/version.json" in part.release.manifest.files
    there = set(list_files(tmp_path / "part"))
    assert {"adapter_model.safetensors", "tokenizer.json", MANIFEST_NAME, "model.sig"} <= there
    assert not [name for name in list_files(hub_cache) if name.endswith("version.json")]
    assert get(repo, only="adapter", out=tmp_path / "part").files == part.files
    whole = get(repo)
    assert set(whole.files) == set(whole.release.manifest.files) > set(part.files)
    (whole.release.path / "tokenizer.json").resolve().write_text("{}")
    assert get(repo, only="adapter").files == part.files  # and mended
    whole.release.check_files()


def test_what_is_no_adapter_has_no_adapter_to_take(api, publish, get, repo, tiny_release) -> None:
    manifest = Manifest.read(tiny_release).model_copy(update={"kind": "merged"})
    (tiny_release / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    publish("0.1.0")
    with pytest.raises(ReleaseError, match="of kind merged"):
        get(repo, only="adapter")


def test_every_way_to_name_a_state(api, publish, get, repo) -> None:
    first = publish("1.0.0")
    second = publish("1.1.0")
    api.create_tag(repo, tag="good", revision=first)
    found = {name: get(f"{repo}@{name}") for name in ("1.0.0", "v1.0.0", "main", "good", first, second)}
    assert {name: it.commit for name, it in found.items()} == {
        "1.0.0": first, "v1.0.0": first, "main": second, "good": first, first: first, second: second,
    }  # fmt: skip
    assert {name: it.tag for name, it in found.items()} == {
        "1.0.0": "v1.0.0", "v1.0.0": "v1.0.0", "main": None, "good": None, first: None, second: None,
    }  # fmt: skip


def test_what_is_not_there_is_named(get, publish, repo) -> None:
    with pytest.raises(RefError, match=f"no public repository {repo}"):
        get(repo)
    publish("0.1.0")
    for missing in ("v9.9.9", "nowhere", "0" * 40):
        with pytest.raises(RefError, match=f"{repo}@{missing}.*no such revision"):
            get(f"{repo}@{missing}")
    with pytest.raises(RefError, match="names no repository"):
        get("../etc/passwd")


def test_a_private_release_needs_its_token(hub_server, publish, get, repo, monkeypatch) -> None:
    publish("0.1.0", private=True)
    with pytest.raises(RefError) as error:
        get(repo)
    assert "HF_TOKEN" in error.value.fix
    with pytest.raises(AuthError, match="does not know the token"):
        get(repo, token="wrong")
    assert get(repo, token=hub_server.token).tag == "v0.1.0"
    monkeypatch.setenv("HF_TOKEN", hub_server.token)
    assert get(f"{repo}@v0.1.0").tag == "v0.1.0"


def test_a_stored_login_is_used(hub_server, publish, get, repo) -> None:
    publish("0.1.0", private=True)
    Path(constants.HF_TOKEN_PATH).write_text(hub_server.token)
    assert get(repo).tag == "v0.1.0"


def test_a_repository_that_is_no_release(api, get, repo) -> None:
    api.create_repo(repo)
    with pytest.raises(ManifestError, match="not a release"):
        get(repo)


def test_a_file_changed_on_the_hub_is_found(hub_server, api, publish, get, repo) -> None:
    publish("0.1.0")
    bad = api.upload_file(
        repo_id=repo, path_or_fileobj=b"changed", path_in_repo="adapter_model.safetensors"
    ).oid
    assert get(repo).tag == "v0.1.0"  # the version is what it was
    with pytest.raises(SignatureError, match=r"adapter_model\.safetensors") as error:
        get(f"{repo}@main")
    assert "tell its maker" in error.value.fix
    hub_server.move_tag(repo, "v0.1.0", bad)
    with pytest.raises(SignatureError, match=r"adapter_model\.safetensors"):
        get(repo)


def test_a_file_put_into_the_cache_is_not_called_the_hubs(publish, get, repo) -> None:
    publish("0.1.0")
    put = get(repo).release.path / "adapter_config.json"
    put.unlink()  # a link until now
    put.write_text("{}")
    with pytest.raises(SignatureError, match=r"adapter_config\.json is not the file") as error:
        get(repo)
    assert "written here since" in error.value.fix
    put.unlink()
    assert get(repo).release.path == put.parent


def test_a_file_missing_on_the_hub_is_found(api, publish, get, repo) -> None:
    publish("0.1.0")
    api.delete_file("evidence/version.json", repo)
    with pytest.raises(SignatureError, match=r"evidence/version\.json is listed"):
        get(f"{repo}@main")


def test_what_the_manifest_does_not_list_is_not_downloaded(api, publish, get, repo) -> None:
    publish("0.1.0")
    api.upload_file(repo_id=repo, path_or_fileobj=b"\x80\x04.", path_in_repo="pytorch_model.bin")
    pulled = get(f"{repo}@main")
    assert set(list_files(pulled.release.path)) == {MANIFEST_NAME, *pulled.release.manifest.files}


@pytest.mark.parametrize("name", ["../outside", "/etc/x", "a/../../b", "C:/x"])
def test_a_manifest_cannot_name_files_outside(api, publish, get, repo, tiny_release, name) -> None:
    publish("0.1.0")
    manifest = json.loads((tiny_release / MANIFEST_NAME).read_bytes())
    manifest["files"][name] = {"sha256": "0" * 64, "size": 1}
    api.upload_file(repo_id=repo, path_or_fileobj=json.dumps(manifest).encode(), path_in_repo=MANIFEST_NAME)
    with pytest.raises(ManifestError, match="files"):
        get(f"{repo}@main")


def test_a_tag_moved_to_another_version_is_found(hub_server, publish, get, repo) -> None:
    publish("1.0.0")
    later = publish("1.1.0")
    hub_server.move_tag(repo, "v1.0.0", later)
    with pytest.raises(SignatureError, match=r"v1\.0\.0 holds version 1\.1\.0: the tag was moved"):
        get(f"{repo}@1.0.0")


def test_who_signed_it(publish, get, repo, keys) -> None:
    publish("0.1.0", key=keys.private)
    stranger = get(repo)
    assert stranger.signer is None
    assert stranger.release.is_signed
    with pytest.raises(SignatureError, match="no key to check"):
        get(repo, require_signed=True)
    named = get(repo, keys=[keys.public], require_signed=True)
    assert named.signer is not None
    assert named.signer.fingerprint == keys.fingerprint
    trust_key(keys.public)
    assert get(repo, require_signed=True).signer is not None


def test_an_unsigned_release_only_where_no_signature_is_asked_for(publish, get, repo, keys) -> None:
    publish("0.1.0")
    trust_key(keys.public)
    assert get(repo).signer is None
    with pytest.raises(SignatureError, match="not signed"):
        get(repo, require_signed=True)


def test_a_signature_that_does_not_hold_is_refused_always(
    hub_server, api, publish, get, repo, keys, tiny_release
) -> None:
    publish("0.1.0", key=keys.private)
    trust_key(keys.public)
    # Somebody changes a file, and makes a manifest that fits it: only the signature can tell.
    pulled = get(repo)
    changed = b'"forged"'
    entry = {"sha256": sha256(changed).hexdigest(), "size": len(changed)}
    manifest = json.loads((pulled.release.path / MANIFEST_NAME).read_bytes())
    manifest["files"]["evidence/version.json"] = entry
    api.upload_file(repo_id=repo, path_or_fileobj=changed, path_in_repo="evidence/version.json")
    commit = api.upload_file(
        repo_id=repo, path_or_fileobj=json.dumps(manifest).encode(), path_in_repo=MANIFEST_NAME
    ).oid
    hub_server.move_tag(repo, "v0.1.0", commit)
    with pytest.raises(SignatureError, match=SIGNATURE_NAME):
        get(repo)
    api.upload_file(repo_id=repo, path_or_fileobj=b"no bundle", path_in_repo=SIGNATURE_NAME)
    with pytest.raises(SignatureError, match="not a signature bundle"):
        get(f"{repo}@main")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", MANIFEST_NAME])
def test_a_damaged_cache_is_found_and_mended(publish, get, repo, monkeypatch, name) -> None:
    publish("0.1.0")
    pulled = get(repo)
    blob = (pulled.release.path / name).resolve()
    whole = blob.read_bytes()
    blob.write_bytes(whole.replace(b"o", b"0"))
    seen = count_downloads(monkeypatch)
    assert get(repo) == pulled
    assert blob.read_bytes() == whole
    assert seen == [name]


def test_damage_is_found_though_the_time_of_change_was_set_back(publish, get, repo) -> None:
    publish("0.1.0")
    pulled = get(repo)
    blob = (pulled.release.path / "adapter_model.safetensors").resolve()
    whole, stat = blob.read_bytes(), blob.stat()
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert get(repo) == pulled
    assert blob.read_bytes() == whole


def test_what_was_written_into_the_cache_is_not_taken_for_the_hubs(publish, get, repo, keys) -> None:
    commit = publish("0.1.0")
    folder = get(repo).release.path
    trust_key(keys.public)
    sign_release(folder, keys.private)
    for ref in (repo, f"{repo}@{commit}"):
        with pytest.raises(SignatureError, match=rf"{SIGNATURE_NAME} is not what the Hub holds at") as error:
            get(ref, require_signed=True)
        assert str(folder) in error.value.fix
    (folder / SIGNATURE_NAME).unlink()
    assert get(repo).signer is None
    Release.open(folder).with_files({"evidence/more.json": b"{}"})
    with pytest.raises(SignatureError, match=rf"{MANIFEST_NAME} is not what the Hub holds"):
        get(repo)
    shutil.rmtree(folder)
    assert "evidence/more.json" not in get(repo).release.manifest.files


def test_what_another_tool_left_in_the_cache_is_checked_too(publish, get, repo, keys, hub_cache) -> None:
    publish("0.1.0")
    folder = get(repo).release.path
    sign_release(folder, keys.private)
    for note in hub_cache.rglob(".adapterhub"):
        shutil.rmtree(note)
    with pytest.raises(SignatureError, match="not what the Hub holds"):
        get(repo, keys=[keys.public], require_signed=True)


def test_a_signature_removed_from_the_cache_comes_back(publish, get, repo, keys) -> None:
    publish("0.1.0", key=keys.private)
    pulled = get(repo, keys=[keys.public])
    (pulled.release.path / SIGNATURE_NAME).unlink()
    assert get(repo, keys=[keys.public], require_signed=True) == pulled


def test_only_what_is_missing_is_downloaded_again(publish, get, repo, monkeypatch) -> None:
    publish("0.1.0")
    pulled = get(repo)
    missing = pulled.release.path / "tokenizer.json"
    missing.resolve().unlink()
    missing.unlink()
    seen = count_downloads(monkeypatch)
    assert get(repo) == pulled
    assert seen == ["tokenizer.json"]


def count_downloads(monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None, error=None) -> list[str]:
    """The names of the files whose bytes are asked for, as they are; the one after ``fail_after`` raises."""
    seen: list[str] = []
    real = downloads._Download._receive
    lock = threading.Lock()

    def get_bytes(self: downloads._Download, *args):
        with lock:
            if fail_after is not None and len(seen) >= fail_after:
                raise error
            seen.append(self.name.rpartition("/")[2])
        return real(self, *args)

    monkeypatch.setattr(downloads._Download, "_receive", get_bytes)
    return seen


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_pull_cut_off_keeps_whole_files_only_and_goes_on(
    publish, get, repo, hub_cache, monkeypatch, error
) -> None:
    publish("0.1.0")
    with monkeypatch.context() as patch:
        count_downloads(patch, fail_after=3, error=error)
        with pytest.raises(type(error)):
            get(repo)
    kept = contents(next(hub_cache.glob("models--*/snapshots/*")))
    again = count_downloads(monkeypatch)
    folder = get(repo).release.path
    assert MANIFEST_NAME in kept
    assert kept.items() <= contents(folder).items()
    assert sorted([*again, *(name.rpartition("/")[2] for name in kept)]) == sorted(
        name.rpartition("/")[2] for name in list_files(folder)
    )


def test_out_gets_a_copy_of_its_own(publish, get, repo, tmp_path) -> None:
    publish("0.1.0")
    out = tmp_path / "somewhere" / "out"
    pulled = get(repo, out=out)
    assert pulled.release.path == out
    assert contents(out) == contents(get(repo).release.path)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert get(repo, out=out) == pulled  # there already
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_out_that_holds_something_else_is_left_alone(publish, get, repo, tmp_path) -> None:
    publish("1.0.0", "1.1.0")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ReleaseError, match="exists already"):
        get(repo, out=out)
    assert contents(out) == {"mine.txt": b"mine"}
    (out / "mine.txt").unlink()
    get(f"{repo}@1.0.0", out=out)  # an empty folder is taken
    with pytest.raises(ReleaseError, match="exists already"):
        get(f"{repo}@1.1.0", out=out)
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(SignatureError, match=r"adapter_config\.json"):
        get(f"{repo}@1.0.0", out=out)
    assert (out / "adapter_config.json").read_text() == "{}"


def test_a_full_disk_leaves_nothing_half_copied(publish, get, repo, tmp_path, monkeypatch) -> None:
    publish("0.1.0")
    real = shutil.copyfile

    def full(source, target, **options):
        if Path(target).name == "tokenizer.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))
        return real(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", full)
    out = tmp_path / "parent" / "out"
    with pytest.raises(OSError, match="No space left") as error:
        get(repo, out=out)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(out))
    assert list(out.parent.iterdir()) == []


def test_without_a_network_what_was_pulled_is_found(publish, get, repo) -> None:
    commit = publish("0.1.0")
    pulled = get(f"{repo}@0.1.0")
    get(f"{repo}@main")
    assert not pulled.offline
    with pytest.warns(AdapterHubWarning, match=f"could not be reached.*pulled before as {repo}@v0.1.0"):
        assert get(f"{repo}@0.1.0", endpoint=DEAD) == replace(pulled, offline=True)
    assert get(f"{repo}@{commit}", endpoint=DEAD).release == pulled.release
    with pytest.raises(HubError, match=r"@main may have moved") as error:
        get(f"{repo}@main", endpoint=DEAD)
    assert f"{repo}@{commit}" in error.value.fix
    with pytest.raises(HubError, match="no answer from") as error:
        get(repo, endpoint=DEAD)
    assert f"{repo}@v0.1.0" in error.value.fix
    with pytest.raises(HubError, match="no answer from") as error:
        get("ada/never-pulled@0.1.0", endpoint=DEAD)
    assert "check the network" in error.value.fix


def test_without_a_network_a_part_says_what_it_lacks_and_nobody_waits(
    publish, get, repo, hub_cache, monkeypatch
) -> None:
    publish("0.1.0")
    get(f"{repo}@0.1.0", only="adapter")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits for a Hub that gave no answer"))
    lacks = f"the cache lacks evidence/version.json of {repo}@v0.1.0, and {DEAD} cannot be asked"
    with pytest.warns(AdapterHubWarning), pytest.raises(HubError, match=lacks):
        get(f"{repo}@0.1.0", endpoint=DEAD)


def test_offline_the_main_branch_stands_for_a_repository_without_versions(publish, api, get, repo) -> None:
    publish("0.1.0")
    api.delete_tag(repo, tag="v0.1.0")
    pulled = get(repo)
    with offline(), pytest.warns(AdapterHubWarning, match="offline; this is what was pulled before"):
        assert get(repo) == replace(pulled, offline=True)
    with offline(), pytest.raises(HubError, match="is not asked"):
        get(f"{repo}@latest")


def test_a_gated_repository_says_where_to_ask(publish, api, hub_server, get, repo) -> None:
    publish("0.1.0")
    api.update_repo_settings(repo, gated="manual")
    with pytest.raises(AuthError, match=f"{repo}@v0.1.0 is gated: ") as error:
        get(repo)
    assert f"ask for access at {hub_server.url}/{repo}, " in error.value.fix
    assert "HF_TOKEN" in error.value.fix
    assert get(repo, token=hub_server.token).tag == "v0.1.0"


def test_a_hub_that_fails_is_not_taken_for_one_that_cannot_be_reached(
    publish, get, repo, monkeypatch
) -> None:
    publish("0.1.0")
    get(f"{repo}@0.1.0")

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(HubError, match=r"failed \(500\)"):
            get(f"{repo}@0.1.0", endpoint=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.slow
def test_offline_mode(publish, get, repo, hub_cache) -> None:
    publish("0.1.0")
    pulled = get(repo)
    get(f"{repo}@main")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache)}

    def run(ref: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "adapterhub", "pull", ref, "--json"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    for name in ("0.1.0", "main"):
        found = run(f"{repo}@{name}")
        document = json.loads(found.stdout)
        assert (document["path"], document["offline"]) == (str(pulled.release.path), True)
        told = [line for line in found.stderr.splitlines() if line.startswith("warning: ")]
        assert len(told) == 1
        assert told[0].startswith("warning: offline; this is what was pulled before as")
    missing = run("ada/never-pulled@0.1.0")
    assert missing.returncode == 5
    assert "HF_HUB_OFFLINE" in missing.stderr


@pytest.mark.slow
def test_a_hub_that_dies_between_two_files(start_hub, tiny_release, tmp_path, monkeypatch) -> None:
    import time

    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits up to 8 s between its tries
    with start_hub(tmp_path / "hub") as server:
        push(Release.open(tiny_release), "ada/orders", endpoint=server.url, token=server.token)
        real = downloads._Download._receive
        calls = []

        def dying(*args):
            calls.append(1)
            if len(calls) == 4:
                server.process.kill()
                server.process.wait()
            return real(*args)

        monkeypatch.setattr(downloads._Download, "_receive", dying)
        monkeypatch.setattr(downloads, "_PAUSE", 0.001)
        with pytest.raises(HubError):
            pull("ada/orders", endpoint=server.url)
    monkeypatch.setattr(downloads._Download, "_receive", real)
    with start_hub(tmp_path / "hub") as server:
        assert contents(pull("ada/orders", endpoint=server.url).release.path) == contents(tiny_release)


def test_plain_peft_loads_the_pulled_folder(publish, get, repo, tiny_base, tiny_adapter) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    publish("0.1.0")
    folder = get(repo).release.path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("three pears", return_tensors="pt")
    logits = []
    for adapter in (folder, tiny_adapter):
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(adapter))
        logits.append(model(**tokens).logits)
    assert torch.equal(*logits)
