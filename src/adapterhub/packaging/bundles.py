"""A signature file: a Sigstore bundle as OpenSSF Model Signing writes it, read with suspicion.

The bundle holds a DSSE envelope (https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md) around
an in-toto statement that lists every file with its sha256. It was made with a key, with a certificate, or
with Sigstore. A key's signature is checked here: model_signing loads Sigstore's network client for it, which
takes longer than everything else that ``verify`` does.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterhub.errors import SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SIGNATURE_NAME = "model.sig"
REVIEWS_NAME = "signatures"
"""The folder for further signatures, one file each; none of them covers another."""
MAX_SIGNATURES = 32
RETAKE = "take the release from its source again"

Kind = Literal["key", "certificate", "sigstore"]

_MAX_BYTES = 16 * 1024 * 1024
_REVIEW = re.compile(rf"{REVIEWS_NAME}/[a-z0-9][a-z0-9-]{{0,63}}\.sig")
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_KINDS: dict[str, Kind] = {
    "publicKey": "key",
    "x509CertificateChain": "certificate",
    "certificate": "sigstore",
}
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Bundle:
    """One signature file, parsed; nothing of it is proven yet."""

    name: str
    """Path inside the release: ``model.sig``, ``signatures/ann.sig``."""
    path: Path
    data: bytes
    """The file as it was read."""
    kind: Kind
    hint: str | None
    """The fingerprint of the key that it claims to be made with; for a key's bundle only."""
    public_pem: bytes | None
    """That key, if the bundle holds it and it is the one of the hint."""
    certificate: bytes | None
    """The signer's certificate in DER form; None for a key's bundle."""
    payload: bytes
    signature: bytes
    files: Mapping[str, str]
    """sha256 by file, as the statement lists them."""

    @property
    def claim(self) -> str:
        """Who it says signed, in words; nothing of it is proven."""
        if self.hint is not None:
            return f"the key {self.hint[:16]}…"
        return "a certificate" if self.kind == "certificate" else "a Sigstore identity"


def is_signature(name: str) -> bool:
    """Whether ``name``, a path inside a release, is that of a signature file."""
    return name == SIGNATURE_NAME or _REVIEW.fullmatch(name) is not None


def signature_name(reviewer: str | None) -> str:
    """Where a signature lies: the maker's for None, a reviewer's by their name.

    Raises SignatureError for a name that is not lower-case letters, digits and dashes.
    """
    name = SIGNATURE_NAME if reviewer is None else f"{REVIEWS_NAME}/{reviewer}.sig"
    if not is_signature(name):
        raise SignatureError(
            f"{reviewer!r} cannot name a signature", "use 1 to 64 lower-case letters, digits and dashes"
        )
    return name


def signature_files(folder: Path) -> list[str]:
    """The names of the signature files in a release folder, ``model.sig`` first.

    Raises SignatureError when there are more than ``MAX_SIGNATURES``.
    """
    reviews = folder / REVIEWS_NAME
    names = (
        sorted(f"{REVIEWS_NAME}/{path.name}" for path in reviews.glob("*.sig")) if reviews.is_dir() else []
    )
    found = [name for name in (SIGNATURE_NAME, *names) if is_signature(name) and (folder / name).is_file()]
    if len(found) > MAX_SIGNATURES:
        raise SignatureError(
            f"{folder} holds {len(found)} signatures; {MAX_SIGNATURES} are allowed",
            "remove what is not needed",
        )
    return found


def read_bundle(folder: Path, name: str) -> Bundle:
    """Read a signature file. Raises SignatureError when it is no bundle, or not one that lists files."""
    path = folder / name
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"over {_MAX_BYTES} bytes")
        return _parse(name, path, data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError) as err:
        raise SignatureError(f"{path} is not a signature bundle: {_reason(err)}", RETAKE) from err


def check_key_signature(bundle: Bundle, key: EllipticCurvePublicKey) -> None:
    """Check that ``key`` signed the bundle's statement. Raises SignatureError when it did not."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    algorithm = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size]
    signed = f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(bundle.payload)} ".encode() + bundle.payload
    try:
        key.verify(bundle.signature, signed, ec.ECDSA(algorithm))
    except InvalidSignature as err:
        raise SignatureError(
            f"{bundle.path} does not hold: altered, or not made with the key {str(bundle.hint)[:16]}…", RETAKE
        ) from err


def check_files_signed(bundle: Bundle, digests: Mapping[str, str], signatures: Mapping[str, str]) -> None:
    """Check that a bundle was made over exactly the files of ``digests`` (sha256 by name).

    A bundle of the stock tool also lists the signature files that were there: those must be the ones in
    ``signatures``. Raises SignatureError that names what differs.
    """
    there = {**digests, **{name: digest for name, digest in signatures.items() if name in bundle.files}}
    missing = sorted(bundle.files.keys() - there.keys())
    extra = sorted(there.keys() - bundle.files.keys())
    changed = sorted(name for name in there.keys() & bundle.files.keys() if there[name] != bundle.files[name])
    told = [
        f"{words} {', '.join(names[:3])}"
        for words, names in (("it lacks", extra), ("there is no", missing), ("other content in", changed))
        if names
    ]
    if told:
        raise SignatureError(f"{bundle.path} was made over other files: {_one_line('; '.join(told))}", RETAKE)


def _parse(name: str, path: Path, data: bytes) -> Bundle:
    content = json.loads(data, object_pairs_hook=_unique)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if content["mediaType"] != _MEDIA_TYPE:
        raise ValueError(f"its media type is {content['mediaType']!r}")
    material, envelope = content["verificationMaterial"], content["dsseEnvelope"]
    kinds = [kind for key, kind in _KINDS.items() if key in material]
    if len(kinds) != 1:
        raise ValueError("it names neither a key nor a certificate, or both")
    (kind,) = kinds
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise ValueError("it does not hold one signature")
    payload = _decode(envelope["payload"])
    if envelope["payloadType"] != _PAYLOAD_TYPE:
        raise ValueError(f"its payload type is {envelope['payloadType']!r}")
    hint, public_pem, certificate = None, None, None
    if kind == "key":
        hint, public_pem = _key_of(material["publicKey"])
    elif kind == "certificate":
        certificate = _decode(material["x509CertificateChain"]["certificates"][0]["rawBytes"])
    else:
        certificate = _decode(material["certificate"]["rawBytes"])
    signature = _decode(signatures[0]["sig"])
    files = _statement_files(json.loads(payload, object_pairs_hook=_unique))
    return Bundle(name, path, data, kind, hint, public_pem, certificate, payload, signature, files)


def _key_of(public_key: Mapping[str, Any]) -> tuple[str, bytes | None]:
    """The fingerprint that a bundle names, and the key itself, which ours hold too."""
    from cryptography.hazmat.primitives import serialization

    hint = public_key.get("hint")
    if not isinstance(hint, str) or not _DIGEST.fullmatch(hint):
        raise ValueError("it does not say which key made it")
    if "rawBytes" not in public_key:
        return hint, None
    key = serialization.load_der_public_key(_decode(public_key["rawBytes"]))
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if sha256(pem).hexdigest() != hint:
        raise ValueError("it holds another key than the one that it names")
    return hint, pem


def _statement_files(statement: Mapping[str, Any]) -> dict[str, str]:
    """The files that an in-toto statement of Model Signing lists, found to be what its subject sums up."""
    if statement["_type"] != _STATEMENT_TYPE or statement["predicateType"] != _PREDICATE_TYPE:
        raise ValueError("its statement is of a kind or version that is not known here")
    predicate, subjects = statement["predicate"], statement["subject"]
    how = predicate["serialization"]
    if how["method"] != "files" or how["hash_type"] != "sha256":
        raise ValueError(f"it lists {how['method']!r} by {how['hash_type']!r}, not files by sha256")
    files: dict[str, str] = {}
    total = sha256()
    for resource in predicate["resources"]:
        name, digest = resource["name"], resource["digest"]
        if not isinstance(name, str) or name in files or resource["algorithm"] != "sha256":
            raise ValueError("a file stands twice in it, or is not listed by sha256")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError("it lists a file by what is no sha256")
        files[name] = digest
        total.update(bytes.fromhex(digest))
    if len(subjects) != 1 or subjects[0]["digest"]["sha256"] != total.hexdigest():
        raise ValueError("its statement contradicts itself")
    return files


def _decode(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError("a field that must be base64 text is none")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as err:
        raise ValueError(f"a field is not base64: {err}") from err


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _reason(err: Exception) -> str:
    """Why something is no bundle, in words."""
    if isinstance(err, KeyError):
        return f"it lacks {_one_line(str(err))}"
    if isinstance(err, RecursionError):
        return "it is nested too deep"
    if isinstance(err, json.JSONDecodeError | UnicodeDecodeError):
        return f"it is not JSON: {_one_line(str(err))}"
    return _one_line(str(err)) if isinstance(err, ValueError) else "a part of it is of another type"


def _one_line(text: str, limit: int = 240) -> str:
    shown = "".join(char if char.isprintable() else "�" for char in " ".join(text.split()))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
