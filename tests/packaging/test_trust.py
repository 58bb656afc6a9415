"""The trust policy: what its files may say, which rule counts, and that nothing gets past one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.errors import SignatureError
from adapterhub.load import open_release
from adapterhub.packaging.keys import KeyPair, generate_key, trust_key
from adapterhub.packaging.signing import sign_release
from adapterhub.packaging.trust import Policy, find_project_file, user_file
from adapterhub.packaging.verification import check_release

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is a project of its own."""
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    monkeypatch.chdir(project)
    return project


@pytest.fixture
def ann(tmp_path: Path) -> KeyPair:
    return generate_key(tmp_path / "ann")


@pytest.fixture
def bob(tmp_path: Path) -> KeyPair:
    return generate_key(tmp_path / "bob")


def test_what_a_rule_asks_must_be_there(
    tiny_release: Path, ann: KeyPair, bob: KeyPair, run_cli: RunCli
) -> None:
    assert run_cli("trust", "add", "Acme/*", "--key", ann.public)[0] == 0
    with pytest.raises(SignatureError, match=r"must be signed by key .*it is not signed"):
        check_release(tiny_release, publisher="acme/orders")
    trust_key(bob.public)
    sign_release(tiny_release, bob.private)
    with pytest.raises(SignatureError, match="must be signed by"):  # a key trusted in general is not enough
        check_release(tiny_release, publisher="acme/orders")
    with pytest.raises(SignatureError, match="must be signed by"):  # nor is one named for this once
        check_release(tiny_release, [bob.public], publisher="acme/orders")
    assert check_release(tiny_release, publisher="other/orders").signer is not None
    sign_release(tiny_release, ann.private)
    checked = check_release(tiny_release, publisher="ACME/orders")
    assert [it.fingerprint for it in checked.signers] == [ann.fingerprint]
    assert checked.rules[0].pattern == "Acme/*"


def test_the_most_literal_pattern_counts(
    tiny_release: Path, ann: KeyPair, bob: KeyPair, run_cli: RunCli
) -> None:
    for publisher, pair in (("*", ann), ("acme/*", ann), ("acme/orders", bob)):
        assert run_cli("trust", "add", publisher, "--key", pair.public)[0] == 0
    sign_release(tiny_release, bob.private)
    assert check_release(tiny_release, publisher="acme/orders").signer is not None
    for publisher in ("acme/others", "else/where", None):
        with pytest.raises(SignatureError, match="must be signed by"):
            check_release(tiny_release, publisher=publisher)


def test_load_obeys_a_rule_for_everything_and_for_the_cache(
    tiny_release: Path, ann: KeyPair, run_cli: RunCli, tmp_path: Path
) -> None:
    open_release(tiny_release)
    snapshot = tmp_path / "models--acme--orders" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    tiny_release.rename(snapshot)
    assert run_cli("trust", "add", "acme/*", "--key", ann.public)[0] == 0
    with pytest.raises(SignatureError, match="must be signed by"):
        open_release(snapshot)
    copy = snapshot.rename(tmp_path / "copy")
    open_release(copy)
    assert run_cli("trust", "add", "*", "--key", ann.public)[0] == 0
    with pytest.raises(SignatureError, match="must be signed by"):
        open_release(copy)


def test_a_project_can_only_ask_for_more(
    tiny_release: Path, ann: KeyPair, bob: KeyPair, run_cli: RunCli, elsewhere: Path
) -> None:
    assert run_cli("trust", "add", "acme/*", "--key", ann.public)[0] == 0
    assert run_cli("trust", "add", "acme/*", "--key", bob.public, "--project")[0] == 0
    assert (elsewhere / "adapterhub-trust.toml").is_file()
    sign_release(tiny_release, bob.private)
    with pytest.raises(SignatureError, match=r"as .*/trust\.toml asks"):
        check_release(tiny_release, publisher="acme/orders")
    sign_release(tiny_release, ann.private)
    with pytest.raises(SignatureError, match=r"as .*adapterhub-trust\.toml asks"):
        check_release(tiny_release, publisher="acme/orders")
    sign_release(tiny_release, bob.private, reviewer="bob")
    assert len(check_release(tiny_release, publisher="acme/orders").signers) == 2


def test_a_project_file_is_found_from_below_and_not_beyond_the_repository(elsewhere: Path) -> None:
    (elsewhere.parent / "adapterhub-trust.toml").write_text("schema_version = 1\n")
    below = elsewhere / "a" / "b"
    below.mkdir(parents=True)
    assert find_project_file(below) is None
    (elsewhere / "adapterhub-trust.toml").write_text("schema_version = 1\n")
    assert find_project_file(below) == elsewhere / "adapterhub-trust.toml"


def test_a_reviewer_is_somebody_else_than_the_maker(
    tiny_release: Path, ann: KeyPair, bob: KeyPair, run_cli: RunCli
) -> None:
    assert run_cli("trust", "add", "acme/*", "--key", ann.public)[0] == 0
    for pair in (ann, bob):
        assert run_cli("trust", "add", "acme/*", "--key", pair.public, "--reviewer")[0] == 0
    sign_release(tiny_release, ann.private)
    sign_release(tiny_release, ann.private, reviewer="again")
    with pytest.raises(SignatureError, match="must be reviewed, and signed, by"):
        check_release(tiny_release, publisher="acme/orders")
    sign_release(tiny_release, bob.private, reviewer="bob")
    assert len(check_release(tiny_release, publisher="acme/orders").rules) == 1


def test_a_key_that_came_with_its_release_is_never_trusted_in_silence(
    tiny_release: Path, ann: KeyPair, run_cli: RunCli
) -> None:
    sign_release(tiny_release, ann.private)
    code, out, err = run_cli("verify", tiny_release)
    assert (code, out) == (4, "")
    assert f"adapterhub trust add --from {tiny_release}\n" in err
    code, out, err = run_cli("trust", "add", "acme/*", "--from", tiny_release)
    assert (code, out) == (4, "")
    assert ann.fingerprint in err
    assert "compare it" in err
    assert not user_file().exists()
    code, out, _err = run_cli("trust", "add", "acme/*", "--from", tiny_release, "--yes")
    assert code == 0
    assert ann.fingerprint in out
    assert check_release(tiny_release, publisher="acme/orders").signer is not None
    (tiny_release / "model.sig").unlink()
    with pytest.raises(SignatureError, match="must be signed by"):
        check_release(tiny_release, publisher="acme/orders")


def test_what_verify_says_to_do_does_it(tiny_release: Path, ann: KeyPair, run_cli: RunCli) -> None:
    sign_release(tiny_release, ann.private)
    folder = tiny_release.rename(tiny_release.with_name("my release"))
    _code, _out, err = run_cli("verify", folder)
    proposed = shlex.split(err.rpartition("adapterhub ")[2])
    assert run_cli(*proposed, "--yes")[0] == 0
    code, out, _err = run_cli("verify", folder)
    assert (code, f"signed by    {ann.fingerprint}  (model.sig; trusted by" in out) == (0, True)


def test_a_reviewer_is_trusted_by_their_own_signature(
    tiny_release: Path, ann: KeyPair, bob: KeyPair, run_cli: RunCli
) -> None:
    add = ("trust", "add", "acme/*", "--from", tiny_release, "--yes")
    sign_release(tiny_release, ann.private)
    code, _out, err = run_cli(*add, "--reviewer")
    assert (code, "is not signed by a reviewer" in err) == (4, True)
    sign_release(tiny_release, bob.private, reviewer="bob")
    assert run_cli(*add)[0] == 0
    code, out, _err = run_cli(*add, "--reviewer")
    assert (code, f"must be reviewed, and signed, by key {bob.fingerprint}" in out) == (0, True)
    assert len(check_release(tiny_release, publisher="acme/orders").signers) == 2
    sign_release(tiny_release, ann.private, reviewer="carl")
    code, _out, err = run_cli(*add, "--reviewer")
    assert (code, "by 2 reviewers" in err, "--key FILE" in err) == (4, True, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("acme", "--key", "{key}"), "error: that cannot be trusted: 'acme' is no publisher"),
        (("acme/*", "--certificate", "{key}"), "error: {key} is no certificate in PEM form"),
        (("acme/*", "--key", "{key}", "--subject", "x"), "cannot be trusted: subject belongs to a"),
        (("--key", "{key}", "--reviewer"), "cannot be trusted: a reviewer needs a publisher"),
    ],
)
def test_what_cannot_be_trusted_is_said(
    ann: KeyPair, run_cli: RunCli, arguments: tuple[str, ...], words: str
) -> None:
    told = [it.format(key=ann.public) for it in arguments]
    code, out, err = run_cli("trust", "add", *told)
    assert (code, out) == (4, "")
    assert words.format(key=ann.public) in err


def test_who_says_no_in_a_terminal_trusts_nobody(tiny_release: Path, ann: KeyPair) -> None:
    sign_release(tiny_release, ann.private)
    command = [sys.executable, "-m", "adapterhub", "trust", "add", "acme/*", "--from", str(tiny_release)]
    controller, terminal = os.openpty()
    with subprocess.Popen(command, stdin=terminal, stderr=terminal, stdout=subprocess.PIPE) as running:
        os.close(terminal)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(controller, 1024)
        os.write(controller, b"n\n")
        while b"fix:" not in shown:
            shown += os.read(controller, 1024)
        assert running.wait(timeout=20) == 4
    os.close(controller)
    assert b"is not trusted: you said no" in shown
    assert not user_file().exists()


def test_comments_stay_and_entries_go(ann: KeyPair, bob: KeyPair, run_cli: RunCli) -> None:
    path = user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# mine\nschema_version = 1\n")
    for pair in (ann, bob):
        assert run_cli("trust", "add", "acme/*", "--key", pair.public)[0] == 0
    code, out, _err = run_cli("trust", "add", "acme/*", "--key", bob.public)
    assert (code, out.split(":")[0]) == (0, "there already")
    assert len(tomllib.loads(path.read_text())["trust"]) == 2
    code, out, _err = run_cli("trust", "list")
    assert code == 0
    assert ann.fingerprint in out
    assert run_cli("trust", "remove", ann.fingerprint[:12])[0] == 0
    assert [it.fingerprint for it in Policy.read().files[0][1].trust] == [bob.fingerprint]
    assert run_cli("trust", "remove", "acme/*")[0] == 0
    assert path.read_text().startswith("# mine\n")
    assert Policy.read().rules("acme/x") == ()
    code, _out, err = run_cli("trust", "remove", "acme/*")
    assert code == 1
    assert "nothing in" in err


def test_the_trusted_keys_are_part_of_it(ann: KeyPair, run_cli: RunCli) -> None:
    assert run_cli("trust", "add", "--key", ann.public)[0] == 0
    code, out, _err = run_cli("trust", "list", "--json")
    assert code == 0
    assert ann.fingerprint in out
    assert run_cli("trust", "remove", ann.fingerprint)[0] == 0
    assert ann.fingerprint not in run_cli("trust", "list")[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("schema_version = 2", "schema_version"),
        ("x = 1", "x"),
        ("[[trust]", "not valid TOML"),
        ("\xff", "not valid TOML"),
        ('[[trust]]\npublisher = "acme/*"', "exactly one of key"),
        ('[[trust]]\npublisher = "acme"\nidentity = "a@b"\nissuer = "https://c"', "is no publisher"),
        ('[[trust]]\nidentity = "a@b"', "belong together"),
        ('[[trust]]\nkey = "hello"', "not a public key"),
        ('[[trust]]\ncertificate = "hello"', "no certificate"),
        ('[[trust]]\nrole = "reviewer"\nidentity = "a@b"\nissuer = "https://c"', "needs a publisher"),
    ],
)
def test_a_malformed_file_is_an_error_and_no_absent_one(tiny_release: Path, content: str, words: str) -> None:
    user_file().parent.mkdir(parents=True, exist_ok=True)
    user_file().write_text(content, encoding="latin-1")
    with pytest.raises(SignatureError, match=words) as caught:
        check_release(tiny_release)
    assert "\n" not in caught.value.what + caught.value.fix


def test_a_file_that_everybody_may_write_decides_nothing(tiny_release: Path, elsewhere: Path) -> None:
    path = elsewhere / "adapterhub-trust.toml"
    path.write_text("schema_version = 1\n")
    path.chmod(0o666)
    with pytest.raises(SignatureError, match="everybody may write it"):
        check_release(tiny_release)
    path.chmod(0o644)
    check_release(tiny_release)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away, which only root may")
def test_a_file_of_another_user_decides_nothing(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = elsewhere / "adapterhub-trust.toml"
    path.write_text("schema_version = 1\n")
    os.chown(path, 12345, 12345)
    Policy.read()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SignatureError, match="belongs to another user"):
        Policy.read()
