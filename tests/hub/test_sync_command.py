"""``push`` and ``pull`` at the command line: what they print, where, and with which exit code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from adapterhub.hub import downloads
from adapterhub.packaging.keys import generate_key
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.signing import sign_release


@pytest.fixture(autouse=True)
def _account(hub_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and the Hub and the token where users have them."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", hub_server.token)


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    return f"ada/sync-{sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


def test_data_goes_to_stdout_and_words_to_stderr(hub_server, run_cli, repo, carded_release) -> None:
    code, out, err = run_cli("push", carded_release, repo)
    commit = HfApi(endpoint=hub_server.url).model_info(repo).sha
    assert (code, out) == (0, f"commit  {hub_server.url}/{repo}/commit/{commit}\ntag     v0.1.0\n")
    assert "not signed" in err
    code, out, err = run_cli("pull", f"{repo}@0.1.0")
    assert code == 0
    assert Path(out.strip()).name == commit
    assert "not signed" in err


def test_json_of_both(run_cli, repo, carded_release, tmp_path) -> None:
    keys = generate_key(tmp_path / "keys")
    sign_release(carded_release, keys.private)
    dry = json.loads(run_cli("push", carded_release, repo, "--dry-run", "--json")[1])
    assert (dry["outcome"], dry["commit"], dry["tag"]) == ("dry run", None, "v0.1.0")
    pushed = json.loads(run_cli("push", carded_release, repo, "--json")[1])
    assert pushed["outcome"] == "pushed"
    assert [it["name"] for it in pushed["files"]] == [it["name"] for it in dry["files"]]
    _, out, err = run_cli("pull", repo, "--json")
    pulled = json.loads(out)
    assert (pulled["commit"], pulled["tag"], pulled["version"]) == (pushed["commit"], "v0.1.0", "0.1.0")
    assert (pulled["signed"], pulled["signer"]) == (True, None)
    assert "do not trust" in err
    out = run_cli("pull", repo, "--json", "--key", keys.public, "--require-signed")[1]
    assert json.loads(out)["signer"]["fingerprint"] == keys.fingerprint


def test_quiet_offline_and_a_part(run_cli, repo, carded_release) -> None:
    run_cli("push", carded_release, repo)
    code, out, err = run_cli("pull", repo, "--quiet")
    assert (code, err) == (0, "")
    dead = ("--endpoint", "http://127.0.0.1:9")
    code, offline, err = run_cli("pull", repo, "--offline", *dead)
    assert (code, offline) == (0, out), err
    assert "warning: offline; this is what was pulled before" in err
    assert run_cli("pull", "ada/never-pulled", "--offline", *dead)[0] == 5
    part = json.loads(run_cli("pull", f"{repo}@latest", "--only", "adapter", "--json")[1])
    assert not part["complete"]
    assert run_cli("pull", repo, "--only", "adapter", "--type", "dataset")[0] == 2


def test_a_pull_request_by_command(run_cli, repo, carded_release) -> None:
    run_cli("push", carded_release, repo)
    (carded_release / MANIFEST_NAME).write_bytes(
        Manifest.read(carded_release).model_copy(update={"version": "0.2.0"}).to_bytes()
    )
    run_cli("card", carded_release)
    code, out, err = run_cli("push", carded_release, repo, "--create-pr", "--message", "Try this")
    assert (code, out) == (0, f"pull request  {os.environ['HF_ENDPOINT']}/{repo}/discussions/1\n")
    assert "as a pull request; no tag yet: push the same again once it is merged" in err
    assert run_cli("push", carded_release, "ada/never-made", "--create-pr", "--private")[0] == 2


def test_a_dry_run_lists_files_and_sizes(run_cli, repo, carded_release) -> None:
    _, out, err = run_cli("push", carded_release, repo, "--dry-run")
    size = (carded_release / "adapter_model.safetensors").stat().st_size
    assert f"new       {size:>12}  adapter_model.safetensors" in out.splitlines()
    assert "nothing was changed" in err
    assert run_cli("pull", repo)[0] == 5


def test_the_endpoint_named_wins_over_the_environment(
    hub_server, run_cli, repo, carded_release, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run_cli("push", carded_release, repo, "--endpoint", hub_server.url, "--private")[0] == 0
    code, out, _ = run_cli("pull", repo, "--endpoint", hub_server.url, "--out", tmp_path / "out")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")


@pytest.mark.parametrize(
    ("token", "arguments", "code", "says"),
    [
        (None, ["pull", "ada/no-such-thing"], 5, "no repository ada/no-such-thing"),
        ("wrong", ["pull", "ada/no-such-thing"], 5, "does not know the token"),
        (None, ["pull", "not a ref"], 5, "names no repository"),
        (None, ["pull", "ada/x", "--endpoint", "http://127.0.0.1:9"], 5, "no answer from http://127.0.0.1:9"),
        ("wrong", ["push", "RELEASE", "ada/x-wrong"], 5, "does not know the token"),
        (None, ["push", "RELEASE", "grace/x"], 5, "may not"),
        (None, ["push", "RELEASE", "x"], 5, "names no repository"),
        (None, ["push", "no-such-folder", "ada/x"], 3, "no such folder"),
        (None, ["push", "RELEASE", "ada/x", "--endpoint", "http://127.0.0.1:9"], 5, "no answer from"),
    ],
)
def test_bad_input_gets_an_error_and_a_fix(
    run_cli, carded_release, monkeypatch, token, arguments, code, says
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    started = time.monotonic()
    result, out, err = run_cli(*[str(carded_release) if it == "RELEASE" else it for it in arguments])
    assert (result, out) == (code, "")
    error, fix = [line for line in err.splitlines() if line.startswith(("error: ", "fix: "))]
    assert says in error
    assert len(fix) > len("fix: ")
    assert "Traceback" not in err
    assert time.monotonic() - started < 30


def test_tampering_and_missing_signatures_exit_4(hub_server, run_cli, repo, carded_release) -> None:
    assert run_cli("push", carded_release, repo)[0] == 0
    code, out, err = run_cli("pull", repo, "--require-signed")
    assert (code, out) == (4, "")
    assert "not signed" in err
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    api.upload_file(repo_id=repo, path_or_fileobj=b"{}", path_in_repo="adapter_config.json")
    code, out, err = run_cli("pull", f"{repo}@main")
    assert (code, out) == (4, "")
    assert "adapter_config.json" in err
    (carded_release / "adapter_config.json").write_text("{}")
    assert run_cli("push", carded_release, repo)[0] == 4


def test_a_pulled_release_is_signed_in_a_copy(run_cli, repo, carded_release, tmp_path) -> None:
    run_cli("push", carded_release, repo)
    cached = Path(run_cli("pull", repo)[1].strip())
    key = generate_key(tmp_path / "keys").private
    link = tmp_path / "link"
    link.symlink_to(cached)
    for folder in (cached, link):
        code, out, err = run_cli("sign", folder, "--key", key)
        assert (code, out) == (3, "")
        assert f"adapterhub pull {repo}@{cached.name} --out DIR" in err
    assert not (cached / "model.sig").exists()
    code, _, err = run_cli("failures", "add", cached, "--prompt", "three pears", "--expect", "3")
    assert (code, "lies in the Hugging Face cache" in err) == (3, True)
    run_cli("pull", f"{repo}@{cached.name}", "--out", tmp_path / "mine")
    assert run_cli("sign", tmp_path / "mine", "--key", key)[0] == 0


def test_a_release_without_a_card_is_not_pushed(run_cli, repo, tiny_release) -> None:
    code, out, err = run_cli("push", tiny_release, repo)
    assert (code, out) == (3, "")
    assert err == (f"error: {tiny_release} has no card\nfix: make it: adapterhub card {tiny_release}\n")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_card_of_another_state_is_not_pushed(run_cli, repo, carded_release, options) -> None:
    from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest

    manifest = Manifest.read(carded_release).model_copy(update={"version": "0.2.0"})
    (carded_release / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    code, out, err = run_cli("push", carded_release, repo, *options)
    assert (code, out) == (3, "")
    assert "README.md does not match the release's manifest and evidence" in err
    assert f"adapterhub card {carded_release}" in err
    assert run_cli("card", carded_release)[0] == 0
    assert run_cli("push", carded_release, repo, *options)[0] == 0
    (carded_release / "README.md").write_text("forged")
    assert run_cli("push", carded_release, repo, *options)[0] == 4


def test_a_taken_version_exits_3(run_cli, repo, carded_release) -> None:
    from adapterhub.packaging.release import Release

    run_cli("push", carded_release, repo)
    Release.open(carded_release).with_files({"evidence/more.json": b"{}"})
    code, _, err = run_cli("push", carded_release, repo)
    assert code == 3
    assert "fix: give the release a version above 0.1.0" in err


def test_a_full_disk_is_said_as_such(run_cli, repo, carded_release, monkeypatch) -> None:
    run_cli("push", carded_release, repo)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/blob")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-2")
    with monkeypatch.context() as patch:
        patch.setattr(downloads._Download, "_receive", full)
        code, out, err = run_cli("pull", repo)
    assert (code, out) == (1, "")
    assert "error: /cache/blob: No space left on device" in err
    assert run_cli("pull", repo)[0] == 0


@pytest.mark.parametrize("command", ["push", "pull"])
def test_help_is_quick_and_imports_nothing_heavy(command: str) -> None:
    program = (
        "import sys; from adapterhub.cli import main\n"
        f"assert main(['{command}', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "OWNER/NAME" in done.stdout


@pytest.mark.slow
def test_push_and_pull_import_no_framework(hub_server, repo, carded_release, tmp_path) -> None:
    program = (
        "import sys; from adapterhub.cli import main\n"
        "assert main(['push', sys.argv[1], sys.argv[2]]) == 0\n"
        "assert main(['inspect', sys.argv[2]]) == 0\n"
        "assert main(['pull', sys.argv[2]]) == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    environment["HF_HOME"] = str(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", program, str(carded_release), repo],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr  # no progress bars where there is no terminal
