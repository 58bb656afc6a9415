"""Signing and verifying a release with OpenSSF Model Signing: one elliptic-curve signature over every file.

The signature (``model.sig``) is a Sigstore bundle as https://github.com/sigstore/model-transparency makes
and verifies it: ``model_signing verify key`` accepts ours, and we accept those of ``model_signing sign key``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from adapterhub.errors import ManifestError, SignatureError
from adapterhub.packaging.files import write_atomic
from adapterhub.packaging.keys import fingerprint, read_private_key, trusted_keys
from adapterhub.packaging.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from adapterhub.packaging.release import Release

NOT_COVERED = (
    "how the model behaves, or whether that is safe",
    "whether the chat template or the training data are safe",
    "whether the card's statements are true",
)
"""What a good signature says nothing about."""

_MAX_SIGNATURE_BYTES = 16 * 1024 * 1024
_RETAKE = "take the release from its source again"
# Model Signing leaves these out by default, so that a signed folder may live in a git repository.
_GIT_PATHS = (".git", ".gitattributes", ".github", ".gitignore")


@dataclass(frozen=True)
class Signer:
    """Who signed a release."""

    fingerprint: str
    """sha256 of the public key's PEM form, 64 hex digits."""
    key: Path
    """The key file it was signed or verified with."""


def sign_release(folder: Path, key: Path, password: str | None = None) -> Signer:
    """Check every file against the manifest, then write ``model.sig`` over all of them, atomically.

    ``key`` is a PEM private key (P-256, P-384 or P-521), ``password`` its passphrase. An older signature is
    replaced. Raises SignatureError when a file is not what the manifest lists, or the key cannot be used.
    """
    from cryptography.hazmat.primitives import serialization

    private = read_private_key(key, password)
    digests = _checked_digests(folder)

    from model_signing import signing

    config = signing.Config().use_elliptic_key_signer(
        private_key=key,
        password=password.encode() if password else None,  # typed str there, but it wants bytes
    )
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / SIGNATURE_NAME
        config.set_hashing_config(_known(digests)).sign(folder.resolve(), bundle)
        write_atomic(folder / SIGNATURE_NAME, bundle.read_bytes())
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return Signer(sha256(public).hexdigest(), key)


def verify_signature(
    folder: Path, public_keys: Sequence[Path], *, known: Mapping[str, str] | None = None
) -> Signer:
    """Check every file against the manifest, then the signature against the files and one of ``public_keys``.

    Works on Hub-cache snapshots, whose files are links. Each file is read once; not those in ``known``, whose
    sha256 the caller has just found. Raises SignatureError when a file was changed, added or removed,
    when there is no signature, when it is malformed, was made over other files, or by a key that is not among
    ``public_keys``; ManifestError when ``folder`` is no release.
    """
    path = folder / SIGNATURE_NAME
    try:
        digests = _checked_digests(folder, known)
    except ManifestError as err:
        if path.is_file() and (folder / MANIFEST_NAME).is_file():
            raise SignatureError(f"{err.what}, though the release was signed", _RETAKE) from err
        raise
    if not path.is_file():
        raise SignatureError(
            f"{folder} is not signed: it holds no {SIGNATURE_NAME}", "ask its maker to sign it"
        )
    if not public_keys:
        raise SignatureError(
            f"no key to check the signature of {folder} with",
            "name its maker's public key with --key, or put it among your trusted keys",
        )
    signer = _claimed_signer(path, public_keys)
    _verify_bundle(folder, path, signer, digests)
    return signer


def check_signature(
    folder: Path,
    keys: Sequence[Path] = (),
    *,
    require_signed: bool = False,
    known: Mapping[str, str] | None = None,
) -> Signer | None:
    """Check every file, and the signature as far as it can be checked with ``keys`` and the trusted keys.

    ``known`` is the sha256 of files that the caller has just hashed: they are not read again. Returns who
    signed it; None when it is unsigned or signed by a stranger, which ``require_signed`` refuses. Raises
    SignatureError for a changed file always, and for a signature that claims a known key and does not hold.
    """
    accepted = [*keys, *trusted_keys()]
    if not require_signed and _is_by_stranger(folder / SIGNATURE_NAME, accepted):
        _checked_digests(folder, known)
        return None
    return verify_signature(folder, accepted, known=known)


def _is_by_stranger(signature: Path, known: Sequence[Path]) -> bool:
    """Whether there is no signature, or one that none of ``known`` is said to have made."""
    if not signature.is_file():
        return True
    hint = _hint(signature)
    return hint not in {fingerprint(key) for key in known}


def _checked_digests(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """The sha256 of every file of a release but its signature, each found to be what the manifest lists."""
    release = Release(folder, Manifest.read(folder))
    manifest = (folder / MANIFEST_NAME).read_bytes()
    if Manifest.from_bytes(manifest, str(folder / MANIFEST_NAME)) != release.manifest:
        raise SignatureError(f"{folder / MANIFEST_NAME} changed while it was read", "do it again")
    release.check_files(known=known)
    digests = {name: entry.sha256 for name, entry in release.manifest.files.items()}
    digests[MANIFEST_NAME] = sha256(manifest).hexdigest()
    return digests


def _known(digests: Mapping[str, str]) -> Any:
    """A model_signing hashing configuration that takes ``digests`` as they are: no file is hashed twice."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest  # the public API has no name for it

    files = manifest.SerializationType.from_args(
        {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": True,
            "ignore_paths": [SIGNATURE_NAME, *_GIT_PATHS],
        }
    )

    class KnownDigests(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            items = [
                files.new_item(name, Digest("sha256", bytes.fromhex(digest)))
                for name, digest in digests.items()
                if name.split("/")[0] not in _GIT_PATHS
            ]
            return manifest.Manifest(Path(model_path).name, items, files)

    return KnownDigests()


def _claimed_signer(path: Path, public_keys: Sequence[Path]) -> Signer:
    """The one of ``public_keys`` that the signature says it was made with; nothing is proven yet."""
    hint = _hint(path)
    candidates = {fingerprint(key): key for key in public_keys}
    if hint in candidates:
        return Signer(hint, candidates[hint])
    raise SignatureError(
        f"{path} was made with the key {hint[:16]}…, none of the {len(candidates)} keys trusted here",
        "if you know that key's owner, name the public key with --key",
    )


def _hint(path: Path) -> str:
    """The fingerprint of the key that a signature bundle claims to be made with."""
    malformed = SignatureError(f"{path} is not a signature bundle", _RETAKE)
    if path.stat().st_size > _MAX_SIGNATURE_BYTES:
        raise malformed
    try:
        material = json.loads(path.read_bytes())["verificationMaterial"]
        if not isinstance(material, dict):
            raise malformed
        if "publicKey" not in material:
            raise SignatureError(
                f"{path} was made with a certificate, not with a key", "verify it with `model_signing verify`"
            )
        hint = material["publicKey"].get("hint")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise malformed from err
    if not isinstance(hint, str) or not hint.isalnum():
        raise SignatureError(f"{path} does not say which key made it", "ask its maker to sign it again")
    return hint


def _verify_bundle(folder: Path, path: Path, signer: Signer, digests: Mapping[str, str]) -> None:
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=signer.key)
    config.set_hashing_config(_known(digests))
    try:
        config.verify(folder, path)
    except InvalidSignature as err:
        raise SignatureError(
            f"{path} does not hold: altered, or not made with the key {signer.fingerprint[:16]}…",
            _RETAKE,
        ) from err
    except ValueError as err:
        why = "was made over other files" if str(err).startswith("Signature mismatch") else "is malformed"
        raise SignatureError(f"{path} {why}: {_one_line(err)}", _RETAKE) from err
    except Exception as err:  # the library lets KeyError, TypeError and its models' errors through
        raise SignatureError(f"{path} is malformed: {type(err).__name__}", _RETAKE) from err


def _one_line(err: Exception, limit: int = 240) -> str:
    text = " ".join(str(err).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
