"""Signing keys: private to their owner, told apart by fingerprint, trusted by lying in a folder."""

from __future__ import annotations

import os
import stat
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import AdapterHubError, AdapterHubWarning, SignatureError
from adapterhub.packaging.files import fsync_folder, write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

PRIVATE_NAME = "adapterhub.key"
PUBLIC_NAME = "adapterhub.pub"
_MAX_PEM_BYTES = 64 * 1024
_NEW_KEY = "make one with `adapterhub keygen`"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # what OpenSSF Model Signing allows


@dataclass(frozen=True)
class KeyPair:
    """A pair of key files."""

    private: Path
    """PKCS #8 PEM, mode 0600."""
    public: Path
    """SubjectPublicKeyInfo PEM."""
    fingerprint: str
    """See ``fingerprint``."""


def generate_key(folder: Path, password: str | None = None) -> KeyPair:
    """Make a new ECDSA P-256 key pair, ``adapterhub.key`` and ``adapterhub.pub``, in ``folder``.

    The private key is created with mode 0600, encrypted when ``password`` is given. Raises AdapterHubError
    when either file exists already: a key is never overwritten.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = folder / PRIVATE_NAME, folder / PUBLIC_NAME
    for path in (private, public):
        if path.exists() or path.is_symlink():
            raise AdapterHubError(f"{path} exists already; a key is never overwritten", "name another folder")
    key = ec.generate_private_key(ec.SECP256R1())
    protection = (
        serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    folder.mkdir(parents=True, exist_ok=True)
    _create(private, secret, 0o600)
    try:
        _create(public, public_pem(key.public_key()), 0o644)
    except BaseException:
        private.unlink(missing_ok=True)
        raise
    fsync_folder(folder)
    return KeyPair(private, public, fingerprint(public))


def read_public_key(path: Path) -> EllipticCurvePublicKey:
    """Read a PEM public key on P-256, P-384 or P-521. Raises SignatureError for anything else."""
    return parse_public_key(_read_pem(path), str(path))


def parse_public_key(data: bytes, where: str) -> EllipticCurvePublicKey:
    """A PEM public key on P-256, P-384 or P-521; ``where`` names it in errors.

    Raises SignatureError for anything else.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if b"PRIVATE KEY-----" in data:
        raise SignatureError(f"{where} is a private key", f"verify with the public one ({PUBLIC_NAME})")
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as err:
        raise SignatureError(
            f"{where} is not a public key in PEM form", f"name an {PUBLIC_NAME} file"
        ) from err
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise SignatureError(f"{where} is no elliptic-curve key on P-256, P-384 or P-521", _NEW_KEY)
    return key


def read_private_key(path: Path, password: str | None = None) -> EllipticCurvePrivateKey:
    """Read a PEM private key that only its owner can read.

    Raises SignatureError when group or others may read the file, when the password is missing, wrong or
    needless, or when it is no elliptic-curve key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    data = _read_pem(path, secret=True)
    try:
        key = serialization.load_pem_private_key(data, password.encode() if password else None)
    except TypeError as err:  # encrypted without a password, or a password without encryption
        if password:
            raise SignatureError(
                f"{path} has no passphrase, but one was given", "leave the passphrase out"
            ) from err
        raise SignatureError(f"{path} is protected by a passphrase", "give its passphrase") from err
    except (ValueError, UnsupportedAlgorithm) as err:
        why, fix = "it is not a private key in PEM form", f"name the {PRIVATE_NAME} that keygen wrote"
        if password:
            why, fix = (
                "the passphrase is wrong, or it is damaged",
                "give the passphrase that it was made with",
            )
        raise SignatureError(f"{path} cannot be read: {why}", fix) from err
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise SignatureError(f"{path} is no elliptic-curve key on P-256, P-384 or P-521", _NEW_KEY)
    return key


def is_encrypted(path: Path) -> bool:
    """Whether a private key file asks for a passphrase. Raises SignatureError when others may read it."""
    return b"ENCRYPTED" in _read_pem(path, secret=True)


def fingerprint(public: Path) -> str:
    """sha256 of the public key's PEM form, 64 hex digits: Model Signing's own key hint.

    Raises SignatureError when ``public`` holds no usable public key.
    """
    return sha256(public_pem(read_public_key(public))).hexdigest()


def config_folder() -> Path:
    """Where the user's keys and trust lie: ``$XDG_CONFIG_HOME/adapterhub`` (``~/.config``)."""
    config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(config) / "adapterhub"


def trusted_folder() -> Path:
    """Where the keys lie that the user trusts, whatever they sign: ``trusted-keys`` in ``config_folder``."""
    return config_folder() / "trusted-keys"


def trusted_keys() -> list[Path]:
    """The PEM public keys the user trusts, sorted by name; empty when there are none.

    A file among them that cannot be read, or is no public key, is left out with an AdapterHubWarning.
    """
    return [path for path in sorted(trusted_folder().glob("*.pub")) if _is_usable(path)]


def _is_usable(path: Path) -> bool:
    try:
        read_public_key(path)
    except (SignatureError, OSError) as err:
        why = err.what if isinstance(err, SignatureError) else f"{path}: {err.strerror}"
        warnings.warn(
            AdapterHubWarning(f"{why}; this file among your trusted keys is left out"), stacklevel=3
        )
        return False
    return True


def trust_key(public: Path) -> Path:
    """Add a public key to the user's trusted keys, under its fingerprint; return where it lies now.

    Raises SignatureError when ``public`` holds no usable public key.
    """
    target = trusted_folder() / f"{fingerprint(public)}.pub"
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(target, public_pem(read_public_key(public)))
    return target


def public_pem(key: EllipticCurvePublicKey) -> bytes:
    """The PEM form of a public key, whose sha256 is its fingerprint."""
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _create(path: Path, data: bytes, mode: int) -> None:
    """Write a new file that has ``mode`` from its first byte on, and fails when it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _read_pem(path: Path, secret: bool = False) -> bytes:
    """A key file's bytes; a secret one must be readable by its owner alone (checked on the open file)."""
    if not path.is_file():
        raise SignatureError(
            f"{path}: no such key file", "check the path, or make a key with `adapterhub keygen`"
        )
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        data = file.read(_MAX_PEM_BYTES + 1)
    if secret and b"PUBLIC KEY-----" in data:
        raise SignatureError(f"{path} is a public key", f"sign with the private one ({PRIVATE_NAME})")
    if secret and mode & 0o077:
        raise SignatureError(
            f"{path} is a private key that others may read (mode {mode:04o})", f"chmod 600 {path}"
        )
    if len(data) > _MAX_PEM_BYTES:
        raise SignatureError(
            f"{path} is too large to be a key", f"name an {PUBLIC_NAME} or {PRIVATE_NAME} file"
        )
    return data
