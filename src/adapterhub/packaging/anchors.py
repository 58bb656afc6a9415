"""Whom a signature is held to: a key, a certificate authority, or a Sigstore identity.

Certificates and Sigstore are checked by model_signing itself.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import AdapterHubError, AdapterHubWarning, SignatureError
from adapterhub.packaging.bundles import RETAKE, SIGNATURE_NAME, Bundle, Kind, check_key_signature
from adapterhub.packaging.keys import parse_public_key
from adapterhub.packaging.statement import known_digests

if TYPE_CHECKING:
    from cryptography import x509

# Where a Sigstore certificate says who vouched for the identity: the present extension and the old one
# (https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md).
_ISSUER, _OLD_ISSUER = "1.3.6.1.4.1.57264.1.8", "1.3.6.1.4.1.57264.1.1"


@dataclass(frozen=True)
class Signer:
    """Who signed a release, as far as something trusted here vouches for it."""

    kind: Kind
    fingerprint: str
    """sha256, 64 hex digits: of the public key's PEM form, or of the certificate's DER form."""
    name: str | None
    """What a certificate or a Sigstore identity calls the signer; None for a bare key."""
    source: Path
    """Where the trust in it comes from: a key file, a certificate file, or a trust file."""
    file: str
    """The signature's path inside the release."""

    def __str__(self) -> str:
        return self.fingerprint if self.name is None else f"{self.name}, certificate {self.fingerprint[:16]}…"


@dataclass(frozen=True)
class TrustedKey:
    """An elliptic-curve public key."""

    pem: bytes
    """Its PEM form, whose sha256 is the fingerprint."""
    source: Path

    @property
    def fingerprint(self) -> str:
        return sha256(self.pem).hexdigest()

    def check(self, bundle: Bundle) -> Signer | None:
        """Who signed; None when the bundle names another key. Raises SignatureError when it does not hold."""
        if bundle.hint != self.fingerprint:
            return None
        check_key_signature(bundle, parse_public_key(self.pem, str(self.source)))
        return Signer("key", self.fingerprint, None, self.source, bundle.name)


@dataclass(frozen=True)
class TrustedAuthority:
    """Certificates of which one must, by way of a chain, have issued the signer's."""

    pem: bytes
    """One or several certificates."""
    subject: str | None
    """What the signer's certificate must be issued to: an e-mail address, a URI, a DNS name or a common name.
    None for whatever these issue."""
    source: Path

    def check(self, bundle: Bundle) -> Signer | None:
        """Who signed; None when the certificate is not issued by these (to ``subject``).

        The chain is checked as of the certificate's first day, for a bundle does not prove when it was made;
        an AdapterHubWarning says when the certificate has expired since. Raises SignatureError when the
        certificate may not be used to sign, or the signature does not hold.
        """
        if bundle.kind != "certificate" or bundle.certificate is None:
            return None
        leaf = parse_certificate(bundle.certificate, bundle.path)
        names = certificate_names(leaf)
        if self.subject is not None and self.subject not in names:
            return None

        def configure(config: Any, scratch: Path) -> None:
            roots = scratch / "roots.pem"
            roots.write_bytes(self.pem)
            config.use_certificate_verifier(certificate_chain=[roots])

        from OpenSSL.crypto import X509StoreContextError

        try:
            _check_by_library(bundle, configure)
        except X509StoreContextError:
            return None
        if leaf.not_valid_after_utc < datetime.now(UTC):
            told = (
                f"the certificate behind {bundle.path} expired on {leaf.not_valid_after_utc:%Y-%m-%d}; "
                "nothing shows that the signature is older"
            )
            warnings.warn(AdapterHubWarning(told), stacklevel=4)
        name = self.subject or (names[0] if names else None)
        return Signer("certificate", _fingerprint(bundle.certificate), name, self.source, bundle.name)


@dataclass(frozen=True)
class TrustedIdentity:
    """Somebody (or a workflow) that an OpenID Connect issuer vouched for when they signed with Sigstore."""

    identity: str
    """An e-mail address or a URI."""
    issuer: str
    """The issuer's URL."""
    source: Path

    def check(self, bundle: Bundle) -> Signer | None:
        """Who signed; None when the bundle is by another identity.

        Sigstore's roots are fetched (and cached) by its client. Raises SignatureError when the certificate,
        its entry in the log or the signature does not hold; AdapterHubError when the roots cannot be fetched.
        """
        if bundle.kind != "sigstore" or bundle.certificate is None:
            return None
        leaf = parse_certificate(bundle.certificate, bundle.path)
        if self.identity not in certificate_names(leaf) or self.issuer != _issuer_of(leaf):
            return None

        def configure(config: Any, _scratch: Path) -> None:
            with asking_sigstore("be asked for its roots"):
                config.use_sigstore_verifier(identity=self.identity, oidc_issuer=self.issuer)

        _check_by_library(bundle, configure)
        return Signer("sigstore", _fingerprint(bundle.certificate), self.identity, self.source, bundle.name)


Anchor = TrustedKey | TrustedAuthority | TrustedIdentity


def read_authority(path: Path, subject: str | None = None) -> TrustedAuthority:
    """The certificates in a PEM file as what a signature is held to. Raises SignatureError for none."""
    data = path.read_bytes()
    authority_digest(data, str(path))
    return TrustedAuthority(data, subject, path)


def authority_digest(pem: bytes, where: str) -> str:
    """sha256 of the first of some PEM certificates, in DER form. Raises SignatureError when there is none."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    try:
        return x509.load_pem_x509_certificates(pem)[0].fingerprint(hashes.SHA256()).hex()
    except ValueError as err:
        raise SignatureError(
            f"{where} is no certificate in PEM form", "name the authority's PEM file"
        ) from err


@contextmanager
def asking_sigstore(purpose: str) -> Iterator[None]:
    """Around what Sigstore's client asks the network: what it raises becomes words.

    Raises AdapterHubError when Sigstore cannot be reached, or certifies nobody.
    """
    import requests
    from sigstore.errors import Error

    try:
        yield
    except (Error, requests.RequestException, OSError) as err:
        told = ": ".join(filter(None, (type(err).__name__, " ".join(str(err).split())[:200])))
        raise AdapterHubError(
            f"Sigstore could not {purpose}: {told}",
            "check the network and the identity token, or use a key or a certificate, which need none",
        ) from err


def parse_certificate(der: bytes, where: Path) -> x509.Certificate:
    """Raises SignatureError when ``der`` is no certificate."""
    from cryptography import x509

    try:
        return x509.load_der_x509_certificate(der)
    except ValueError as err:
        raise SignatureError(f"{where} holds a malformed certificate", RETAKE) from err


def certificate_names(certificate: x509.Certificate) -> list[str]:
    """What a certificate is issued to: e-mail addresses, URIs and DNS names, then the common name."""
    from cryptography import x509

    names: list[str] = []
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        for kind in (x509.RFC822Name, x509.UniformResourceIdentifier, x509.DNSName):
            names += found.get_values_for_type(kind)
    except (x509.ExtensionNotFound, ValueError):  # none, or one that cannot be read: it then names nobody
        pass
    common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return names + [str(it.value) for it in common]


def _issuer_of(certificate: x509.Certificate) -> str | None:
    from cryptography import x509

    for oid in (_ISSUER, _OLD_ISSUER):
        try:
            extension = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(oid)).value
        except (x509.ExtensionNotFound, ValueError):
            continue
        value = extension.value if isinstance(extension, x509.UnrecognizedExtension) else b""
        # The present one is a DER UTF8String (tag 12, a length under 128), the old one bare text.
        text = value[2:] if oid == _ISSUER and value[:1] == b"\x0c" else value
        return text.decode("utf-8", errors="replace")
    return None


def _check_by_library(bundle: Bundle, configure: Callable[[Any, Path], None]) -> None:
    """Have model_signing check a bundle's signature over its own statement; the files are compared by others.

    OpenSSL's X509StoreContextError passes. Raises SignatureError for everything else that does not hold.
    """
    from model_signing import verifying
    from OpenSSL.crypto import X509StoreContextError

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        path = scratch / SIGNATURE_NAME
        path.write_bytes(bundle.data)
        config = verifying.Config()
        configure(config, scratch)
        config.set_hashing_config(known_digests(bundle.files))
        try:
            config.verify(scratch, path)
        except X509StoreContextError:
            raise
        except Exception as err:  # the libraries let KeyError, TypeError and their models' errors through
            why = " ".join(str(err).split())[:200]
            raise SignatureError(
                f"{bundle.path} does not hold: {type(err).__name__}{': ' + why if why else ''}", RETAKE
            ) from err


def _fingerprint(der: bytes) -> str:
    return sha256(der).hexdigest()
