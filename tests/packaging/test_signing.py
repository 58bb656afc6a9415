"""Signing and verifying: ours with ours, ours with the stock tool's, and everything that must not pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.errors import ManifestError, SignatureError
from adapterhub.packaging.keys import KeyPair, generate_key
from adapterhub.packaging.release import Release
from adapterhub.packaging.signing import sign_release
from adapterhub.packaging.verification import verify_signature

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pair(tmp_path: Path) -> KeyPair:
    return generate_key(tmp_path / "keys")


@pytest.fixture
def signed(tiny_release: Path, pair: KeyPair) -> Path:
    sign_release(tiny_release, pair.private)
    return tiny_release


def stock(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_what_was_signed_verifies(signed: Path, pair: KeyPair) -> None:
    assert verify_signature(signed, [pair.public]).signer.fingerprint == pair.fingerprint
    Release.open(signed).check_files()


def test_the_right_key_is_found_among_several(signed: Path, pair: KeyPair, tmp_path: Path) -> None:
    others = [generate_key(tmp_path / name).public for name in ("a", "b")]
    assert verify_signature(signed, [*others, pair.public]).signer.source == pair.public


def test_signing_again_replaces_the_signature(signed: Path, tmp_path: Path) -> None:
    other = generate_key(tmp_path / "other")
    sign_release(signed, other.private)
    assert verify_signature(signed, [other.public]).signer.fingerprint == other.fingerprint


@pytest.mark.slow
def test_the_stock_tool_accepts_ours(signed: Path, pair: KeyPair) -> None:
    args = ("verify", "key", signed, "--signature", signed / "model.sig", "--public_key")
    assert stock(*args, pair.public).returncode == 0
    (signed / "adapter_config.json").write_text("{}")
    assert stock(*args, pair.public).returncode == 1


def test_ours_accepts_the_stock_tools(tiny_release: Path, pair: KeyPair) -> None:
    signature = tiny_release / "model.sig"
    made = stock("sign", "key", tiny_release, "--signature", signature, "--private_key", pair.private)
    assert made.returncode == 0, made.stderr
    assert verify_signature(tiny_release, [pair.public]).signer.fingerprint == pair.fingerprint


def test_a_stock_signature_that_leaves_a_file_out_is_refused(tiny_release: Path, pair: KeyPair) -> None:
    left_out = tiny_release / "adapter_config.json"
    made = stock(
        "sign", "key", tiny_release, "--signature", tiny_release / "model.sig", "--private_key", pair.private,
        "--ignore-paths", left_out,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    with pytest.raises(SignatureError, match=r"over other files.*adapter_config\.json"):
        verify_signature(tiny_release, [pair.public])


def test_a_hub_cache_snapshot_verifies(signed: Path, pair: KeyPair, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(signed.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert verify_signature(snapshot, [pair.public]).signer.fingerprint == pair.fingerprint


def test_a_changed_file_is_not_signed_either(tiny_release: Path, pair: KeyPair) -> None:
    (tiny_release / "adapter_config.json").write_text("{}")
    with pytest.raises(SignatureError, match="is not the file that"):
        sign_release(tiny_release, pair.private)
    assert not (tiny_release / "model.sig").exists()


def test_an_unsigned_release_says_so(tiny_release: Path, pair: KeyPair) -> None:
    with pytest.raises(SignatureError, match="is not signed"):
        verify_signature(tiny_release, [pair.public])


def test_a_plain_folder_is_no_release(tmp_path: Path, pair: KeyPair) -> None:
    with pytest.raises(ManifestError, match="is not a release"):
        verify_signature(tmp_path, [pair.public])


def test_an_unknown_signer_is_refused(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="none of the 1 keys trusted here"):
        verify_signature(signed, [generate_key(tmp_path / "other").public])
    with pytest.raises(SignatureError, match="no key to check the signature"):
        verify_signature(signed, [])


def test_keygen_sign_and_verify_at_the_shell(tiny_release: Path, tmp_path: Path, run_cli: RunCli) -> None:
    code, out, err = run_cli("keygen", tmp_path / "k")
    assert code == 0
    assert "fingerprint" in out
    assert "added to your trusted keys" in err
    assert run_cli("sign", tiny_release, "--key", tmp_path / "k" / "adapterhub.key")[0] == 0
    code, out, _err = run_cli("verify", tiny_release, "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["verified"], result["name"], result["version"]) == (True, "tiny-orders", "0.1.0")
    code, out, _err = run_cli("verify", tiny_release)
    assert code == 0
    assert "not covered" in out


def test_verify_fails_with_exit_code_4(signed: Path, pair: KeyPair, run_cli: RunCli) -> None:
    (signed / "adapter_config.json").write_text("{}")
    code, out, err = run_cli("verify", signed, "--key", pair.public, "--json")
    assert (code, out) == (4, "")
    assert err.startswith("error: ")
    assert "fix: " in err


def test_a_key_with_a_passphrase_signs(
    tiny_release: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERHUB_KEY_PASSWORD", "secret")
    assert run_cli("keygen", tmp_path / "k", "--passphrase")[0] == 0
    key = tmp_path / "k" / "adapterhub.key"
    assert run_cli("sign", tiny_release, "--key", key)[0] == 0
    assert run_cli("verify", tiny_release)[0] == 0
    monkeypatch.setenv("ADAPTERHUB_KEY_PASSWORD", "wrong")
    code, _out, err = run_cli("sign", tiny_release, "--key", key)
    assert code == 4
    assert "passphrase is wrong" in err
    monkeypatch.delenv("ADAPTERHUB_KEY_PASSWORD")
    code, _out, err = run_cli("sign", tiny_release, "--key", key)
    assert code == 4
    assert "ADAPTERHUB_KEY_PASSWORD" in err


def test_keys_mixed_up_are_said(tiny_release: Path, pair: KeyPair, run_cli: RunCli, tmp_path: Path) -> None:
    code, _out, err = run_cli("sign", tiny_release, "--key", pair.public)
    assert (code, "is a public key" in err, "sign with the private one" in err) == (4, True, True)
    code, _out, err = run_cli("keygen", tmp_path / "new", "--passphrase")  # no terminal in tests
    assert (code, "there is no terminal to ask" in err) == (4, True)
    assert not (tmp_path / "new").exists()


def test_a_signing_key_others_may_read_is_refused(tiny_release: Path, pair: KeyPair, run_cli: RunCli) -> None:
    pair.private.chmod(0o644)
    code, _out, err = run_cli("sign", tiny_release, "--key", pair.private)
    assert code == 4
    assert "chmod 600" in err
    assert not (tiny_release / "model.sig").exists()
