"""Key pairs: private from their first byte on, never overwritten, told apart by fingerprint."""

from __future__ import annotations

import stat
from hashlib import sha256
from pathlib import Path

import pytest

from adapterhub.errors import AdapterHubError, AdapterHubWarning, SignatureError
from adapterhub.packaging.keys import (
    fingerprint,
    generate_key,
    is_encrypted,
    read_private_key,
    read_public_key,
    trust_key,
    trusted_folder,
    trusted_keys,
)


def test_a_new_pair_belongs_together_and_the_private_key_to_its_owner_alone(tmp_path: Path) -> None:
    pair = generate_key(tmp_path / "new" / "keys")
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    private = read_private_key(pair.private)
    assert private.public_key().public_numbers() == read_public_key(pair.public).public_numbers()
    assert private.curve.name == "secp256r1"
    assert pair.private.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert pair.fingerprint == sha256(pair.public.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["adapterhub.key", "adapterhub.pub"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(AdapterHubError, match="exists already"):
        generate_key(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_dangling_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "adapterhub.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterHubError, match="exists already"):
        generate_key(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_private_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    pair = generate_key(tmp_path)
    pair.private.chmod(mode)
    with pytest.raises(SignatureError, match="others may read") as caught:
        read_private_key(pair.private)
    assert caught.value.fix == f"chmod 600 {pair.private}"


def test_a_passphrase_is_needed_and_checked(tmp_path: Path) -> None:
    pair = generate_key(tmp_path, "correct horse")
    assert is_encrypted(pair.private)
    assert read_private_key(pair.private, "correct horse").key_size == 256
    with pytest.raises(SignatureError, match="protected by a passphrase"):
        read_private_key(pair.private)
    with pytest.raises(SignatureError, match="passphrase is wrong"):
        read_private_key(pair.private, "wrong")


def test_a_needless_passphrase_is_said(tmp_path: Path) -> None:
    pair = generate_key(tmp_path)
    assert not is_encrypted(pair.private)
    with pytest.raises(SignatureError, match="has no passphrase"):
        read_private_key(pair.private, "x")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_what_is_no_public_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pub"
    path.write_bytes(content)
    with pytest.raises(SignatureError, match="not a public key"):
        read_public_key(path)


def test_other_kinds_of_key_are_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for name, key in (
        ("ed", ed25519.Ed25519PrivateKey.generate()),
        ("k1", ec.generate_private_key(ec.SECP256K1())),
    ):
        path = tmp_path / name
        path.write_bytes(key.public_key().public_bytes(*form))
        with pytest.raises(SignatureError, match="no elliptic-curve key on P-256"):
            read_public_key(path)


def test_the_private_key_is_no_public_key_and_a_missing_one_is_named(tmp_path: Path) -> None:
    pair = generate_key(tmp_path)
    with pytest.raises(SignatureError, match="is a private key"):
        fingerprint(pair.private)
    with pytest.raises(SignatureError, match="no such key file"):
        read_public_key(tmp_path / "none")


def test_trusting_a_key_twice_keeps_one(tmp_path: Path) -> None:
    assert trusted_keys() == []
    pair = generate_key(tmp_path)
    assert trust_key(pair.public) == trust_key(pair.public)
    assert trusted_keys() == [trusted_folder() / f"{pair.fingerprint}.pub"]
    assert fingerprint(trusted_keys()[0]) == pair.fingerprint


def test_a_foreign_file_among_the_trusted_keys_is_left_out_and_named(tmp_path: Path) -> None:
    pair = generate_key(tmp_path)
    trusted = trust_key(pair.public)
    (trusted_folder() / "friend.pub").write_text("ssh-ed25519 AAAA friend@home")
    (trusted_folder() / "mine.pub").write_bytes(pair.private.read_bytes())
    (trusted_folder() / "folder.pub").mkdir()
    with pytest.warns(AdapterHubWarning) as told:
        assert trusted_keys() == [trusted]
    assert [str(it.message).partition(".pub")[0].rpartition("/")[2] for it in told] == [
        "folder",
        "friend",
        "mine",
    ]
