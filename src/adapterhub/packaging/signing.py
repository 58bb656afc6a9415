"""Signing a release with OpenSSF Model Signing: with a key, a certificate, a token's key, or Sigstore.

A signature is a Sigstore bundle as https://github.com/sigstore/model-transparency makes and verifies it:
``model_signing verify`` accepts ours, and we accept those of ``model_signing sign``. The maker's is
``model.sig``; others (reviewers) add theirs below ``signatures``, and no signature covers another.
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import AdapterHubError, SignatureError
from adapterhub.packaging.anchors import Signer, asking_sigstore, certificate_names, parse_certificate
from adapterhub.packaging.bundles import Bundle, read_bundle, signature_name
from adapterhub.packaging.files import write_atomic
from adapterhub.packaging.keys import read_private_key
from adapterhub.packaging.statement import known_digests, signed_files
from adapterhub.packaging.verification import checked_digests

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

Configure = Callable[[Any], "EllipticCurvePublicKey | None"]
"""Gives a ``model_signing.signing.Config`` its signer, and returns the bare key that others verify with."""


def sign_release(
    folder: Path, key: Path, password: str | None = None, *, reviewer: str | None = None
) -> Signer:
    """Check every file against the manifest, then sign them all with a key, atomically.

    ``key`` is a PEM private key (P-256, P-384 or P-521), ``password`` its passphrase. The signature is
    ``model.sig``, or ``signatures/<reviewer>.sig``; an older one of that name is replaced. The public key is
    put into it, so that who takes the release can be shown its fingerprint. Raises SignatureError when a
    file is not what the manifest lists, or the key cannot be used.
    """
    private = read_private_key(key, password)

    def configure(config: Any) -> EllipticCurvePublicKey:
        config.use_elliptic_key_signer(
            private_key=key,
            password=password.encode() if password else None,  # typed str there, but it wants bytes
        )
        return private.public_key()

    return _sign(folder, reviewer, configure, key)


def sign_with_certificate(
    folder: Path,
    key: Path,
    certificate: Path,
    chain: Sequence[Path] = (),
    password: str | None = None,
    *,
    reviewer: str | None = None,
) -> Signer:
    """As ``sign_release``, with the X.509 ``certificate`` (PEM) of ``key`` and its issuers' up to the root.

    Raises SignatureError too when the certificate is not the key's, or is no certificate.
    """
    private = read_private_key(key, password)

    def configure(config: Any) -> None:
        from cryptography import x509
        from model_signing._signing import sign_certificate, sign_ec_key

        class CertificateSigner(sign_certificate.Signer):
            """model_signing's own opens no key with a passphrase."""

            def __init__(self) -> None:
                sign_ec_key.Signer.__init__(self, key, password.encode() if password else None)
                self._signing_certificate = x509.load_pem_x509_certificate(certificate.read_bytes())
                issuers = b"".join(path.read_bytes() for path in chain)
                self._trust_chain = x509.load_pem_x509_certificates(issuers) if issuers else []

        try:
            config._signer = CertificateSigner()
        except ValueError as err:
            raise SignatureError(
                f"{certificate} (or its chain) is no certificate in PEM form", "name the CA's PEM files"
            ) from err
        if config._signer._signing_certificate.public_key() != private.public_key():
            raise SignatureError(
                f"{certificate} was issued for another key than {key}", "name the certificate of this key"
            )

    return _sign(folder, reviewer, configure, certificate)


def sign_with_token(
    folder: Path, uri: str, modules: Sequence[Path] = (), *, reviewer: str | None = None
) -> Signer:
    """As ``sign_release``, with a key that stays in a PKCS #11 token (a smart card, an HSM).

    ``uri`` is RFC 7512's, like ``pkcs11:token=release;object=signer?pin-value=…``; ``modules`` are folders
    that hold PKCS #11 modules. Raises SignatureError too when the token, or a key on P-256, P-384 or P-521 in
    it, cannot be used; AdapterHubError when the ``pkcs11`` extra is not installed.
    """

    def configure(config: Any) -> EllipticCurvePublicKey:
        config.use_pkcs11_signer(pkcs11_uri=uri, module_paths=[str(path) for path in modules])
        public: EllipticCurvePublicKey = config._signer.public_key()
        return public

    return _sign(folder, reviewer, configure, Path("pkcs11"), _using_token(uri))


def sign_with_sigstore(
    folder: Path, *, identity_token: str | None = None, reviewer: str | None = None
) -> Signer:
    """As ``sign_release``, without a key: Sigstore certifies who you are, and logs the signature publicly.

    Who you are is said by ``identity_token`` (an OpenID Connect token), by the CI system this runs in, or in
    a browser. Raises AdapterHubError when Sigstore cannot be reached or certifies nobody.
    """

    def configure(config: Any) -> None:
        config.use_sigstore_signer(use_ambient_credentials=True, identity_token=identity_token)

    return _sign(folder, reviewer, configure, Path("sigstore"), asking_sigstore("sign"))


def _sign(
    folder: Path,
    reviewer: str | None,
    configure: Configure,
    source: Path,
    guard: AbstractContextManager[None] | None = None,
) -> Signer:
    name = signature_name(reviewer)
    _release, digests = checked_digests(folder)

    from model_signing import signing

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "bundle"
        with guard or nullcontext():
            config = signing.Config()
            public = configure(config)
            config.set_hashing_config(known_digests(signed_files(digests)))
            config.sign(folder.resolve(), path)
        data = path.read_bytes()
    if public is not None:
        data = _with_key(data, public)
    (folder / name).parent.mkdir(exist_ok=True)
    write_atomic(folder / name, data)
    return _described(read_bundle(folder, name), source)


def _with_key(data: bytes, public: EllipticCurvePublicKey) -> bytes:
    """A key's bundle with the key itself beside its hint: stock readers skip it, ours can show it."""
    from cryptography.hazmat.primitives import serialization

    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    content = json.loads(data)
    content["verificationMaterial"]["publicKey"]["rawBytes"] = base64.b64encode(der).decode()
    return json.dumps(content, separators=(",", ":")).encode()


def _described(bundle: Bundle, source: Path) -> Signer:
    if bundle.certificate is None:
        return Signer(bundle.kind, str(bundle.hint), None, source, bundle.name)
    names = certificate_names(parse_certificate(bundle.certificate, bundle.path))
    fingerprint = sha256(bundle.certificate).hexdigest()
    return Signer(bundle.kind, fingerprint, names[0] if names else None, source, bundle.name)


@contextmanager
def _using_token(uri: str) -> Iterator[None]:
    """Around a PKCS #11 token's use. The URI may hold a PIN: it is never shown."""
    try:
        yield
    except RuntimeError as err:
        if "extra" not in str(err):
            raise
        raise AdapterHubError(
            "signing with a PKCS #11 token needs packages that are not installed",
            "pip install 'adapterhub[pkcs11]'",
        ) from err
    except Exception as err:  # the library's, the URI parser's and the module's own
        told = " ".join(str(err).replace(uri, "the URI").split())
        told = re.sub(r"pin-value=[^;&?\s]*", "pin-value=…", told)[:200]
        raise SignatureError(
            f"the PKCS #11 token cannot be used: {type(err).__name__}: {told}",
            "check the URI, the PIN, and the folder of the module",
        ) from err
