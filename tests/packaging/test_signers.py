"""Several signatures on one release, certificates, tokens, Sigstore: ours, the stock tool's, and neither."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from adapterhub.errors import AdapterHubError, AdapterHubWarning, SignatureError
from adapterhub.packaging.anchors import read_authority
from adapterhub.packaging.keys import KeyPair, generate_key, read_private_key
from adapterhub.packaging.signing import (
    sign_release,
    sign_with_certificate,
    sign_with_sigstore,
    sign_with_token,
)
from adapterhub.packaging.verification import verify_signature

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ann(tmp_path: Path) -> KeyPair:
    return generate_key(tmp_path / "ann")


@pytest.fixture
def bob(tmp_path: Path) -> KeyPair:
    return generate_key(tmp_path / "bob")


def stock(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


class Authority:
    """A root certificate that issues others, as files in ``folder``."""

    def __init__(self, folder: Path, name: str = "Root") -> None:
        folder.mkdir()
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.root = self._build(self.subject, self.key.public_key(), ca=True)
        self.file = self._write("root.pem", self.root)

    def issue(
        self, key: Path, to: str, *, days: int = 30, signing: bool = True, password: str | None = None
    ) -> Path:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, to)])
        public = read_private_key(key, password).public_key()
        made = self._build(subject, public, ca=False, days=days, signing=signing, mail=to)
        return self._write(f"{to}.pem", made)

    def _build(self, subject, public, *, ca, days=3650, signing=True, mail=None) -> x509.Certificate:
        now = datetime.now(UTC)
        start = now - timedelta(days=3650 if ca else 60)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=signing, key_cert_sign=ca, crl_sign=ca, content_commitment=False,
                    key_encipherment=False, data_encipherment=False, key_agreement=not signing,
                    encipher_only=False, decipher_only=False,
                ),
                critical=True,
            )
        )  # fmt: skip
        if mail:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.RFC822Name(mail)]), critical=False
            )
            purpose = ExtendedKeyUsageOID.CODE_SIGNING if signing else ExtendedKeyUsageOID.SERVER_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def test_a_reviewers_signature_leaves_the_makers_alone(
    tiny_release: Path, ann: KeyPair, bob: KeyPair, run_cli: RunCli
) -> None:
    assert run_cli("sign", tiny_release, "--key", ann.private)[0] == 0
    made = (tiny_release / "model.sig").read_bytes()
    code, out, _err = run_cli("sign", tiny_release, "--key", bob.private, "--as", "bob")
    assert code == 0
    assert str(tiny_release / "signatures" / "bob.sig") in out
    assert (tiny_release / "model.sig").read_bytes() == made
    both = verify_signature(tiny_release, [bob.public, ann.public])
    assert [(it.file, it.fingerprint) for it in both.signers] == [
        ("model.sig", ann.fingerprint),
        ("signatures/bob.sig", bob.fingerprint),
    ]
    code, out, _err = run_cli("verify", tiny_release, "--key", bob.public, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["signer"]["fingerprint"] == bob.fingerprint
    assert [it["file"] for it in result["strangers"]] == ["model.sig"]
    (tiny_release / "adapter_config.json").write_text("{}")
    with pytest.raises(SignatureError):
        verify_signature(tiny_release, [bob.public])


@pytest.mark.parametrize("name", ["", "Bob", "../bob", "a/b", "b" * 65, "b.sig"])
def test_a_reviewers_name_is_plain(tiny_release: Path, ann: KeyPair, name: str) -> None:
    with pytest.raises(SignatureError, match="cannot name a signature"):
        sign_release(tiny_release, ann.private, reviewer=name)


def test_what_else_lies_among_the_signatures_is_refused(tiny_release: Path, ann: KeyPair) -> None:
    sign_release(tiny_release, ann.private)
    (tiny_release / "signatures").mkdir()
    (tiny_release / "signatures" / "modeling.py").write_text("print('hello')")
    with pytest.raises(SignatureError, match=r"does not list: signatures/modeling\.py"):
        verify_signature(tiny_release, [ann.public])


@pytest.mark.slow
def test_the_stock_tool_and_ours_accept_each_others_beside_each_other(
    tiny_release: Path, ann: KeyPair, bob: KeyPair
) -> None:
    sign_release(tiny_release, ann.private)
    sign_release(tiny_release, bob.private, reviewer="bob")
    for pair, name in ((ann, "model.sig"), (bob, "signatures/bob.sig")):
        done = stock(
            "verify", "key", tiny_release, "--signature", tiny_release / name, "--public_key", pair.public
        )
        assert done.returncode == 0, done.stderr
    late = tiny_release / "signatures" / "late.sig"  # covers the two that are there
    made = stock("sign", "key", tiny_release, "--signature", late, "--private_key", ann.private)
    assert made.returncode == 0, made.stderr
    assert len(verify_signature(tiny_release, [ann.public]).signers) == 2
    sign_release(tiny_release, ann.private)  # another model.sig than the one that was covered
    with pytest.raises(SignatureError, match=r"over other files.*model\.sig"):
        verify_signature(tiny_release, [ann.public])


def test_a_certificate_is_held_to_its_authority_and_subject(
    tiny_release: Path, ann: KeyPair, authority: Authority, tmp_path: Path, run_cli: RunCli
) -> None:
    certificate = authority.issue(ann.private, "ann@acme.example")
    args = ("sign", tiny_release, "--key", ann.private, "--certificate", certificate)
    code, out, err = run_cli(*args)
    assert code == 0, err
    assert "ann@acme.example" in out
    signer = verify_signature(tiny_release, anchors=[read_authority(authority.file)]).signer
    assert (signer.kind, signer.name) == ("certificate", "ann@acme.example")
    for wrong in (
        read_authority(Authority(tmp_path / "other").file),
        read_authority(authority.file, "eve@acme.example"),
    ):
        with pytest.raises(SignatureError, match="none of the 1 keys and names trusted here"):
            verify_signature(tiny_release, anchors=[wrong])
    assert run_cli("verify", tiny_release, "--certificate", authority.file)[0] == 0
    args = ("trust", "add", "*", "--certificate", authority.file, "--subject", "ann@acme.example")
    assert run_cli(*args)[0] == 0
    code, out, _err = run_cli("verify", tiny_release)
    assert code == 0
    assert "ann@acme.example" in out


def test_a_certificates_signature_is_checked_too(
    tiny_release: Path, ann: KeyPair, bob: KeyPair, authority: Authority
) -> None:
    sign_with_certificate(tiny_release, ann.private, authority.issue(ann.private, "ann@acme.example"))
    path = tiny_release / "model.sig"
    content = json.loads(path.read_bytes())
    sign_release(tiny_release, bob.private)
    content["dsseEnvelope"] = json.loads(path.read_bytes())["dsseEnvelope"]
    path.write_text(json.dumps(content))
    with pytest.raises(SignatureError, match="does not hold: InvalidSignature"):
        verify_signature(tiny_release, anchors=[read_authority(authority.file)])


def test_a_certificate_for_another_purpose_or_key_signs_nothing(
    tiny_release: Path, ann: KeyPair, bob: KeyPair, authority: Authority
) -> None:
    with pytest.raises(SignatureError, match="was issued for another key"):
        sign_with_certificate(tiny_release, bob.private, authority.issue(ann.private, "ann@acme.example"))
    web = authority.issue(ann.private, "web@acme.example", signing=False)
    sign_with_certificate(tiny_release, ann.private, web)
    with pytest.raises(SignatureError, match="cannot be used for signing"):
        verify_signature(tiny_release, anchors=[read_authority(authority.file)])


def test_an_expired_certificate_is_told(tiny_release: Path, ann: KeyPair, authority: Authority) -> None:
    sign_with_certificate(
        tiny_release, ann.private, authority.issue(ann.private, "ann@acme.example", days=-1)
    )
    with pytest.warns(AdapterHubWarning, match="expired on"):
        verify_signature(tiny_release, anchors=[read_authority(authority.file)])


def test_a_certificates_key_may_have_a_passphrase(
    tiny_release: Path, tmp_path: Path, authority: Authority
) -> None:
    pair = generate_key(tmp_path / "locked", "secret")
    certificate = authority.issue(pair.private, "ann@acme.example", password="secret")
    sign_with_certificate(tiny_release, pair.private, certificate, [authority.file], "secret")
    assert verify_signature(tiny_release, anchors=[read_authority(authority.file)]).signer is not None


@pytest.mark.slow
def test_the_stock_tool_and_ours_accept_each_others_certificates(
    tiny_release: Path, ann: KeyPair, authority: Authority
) -> None:
    certificate, signature = authority.issue(ann.private, "ann@acme.example"), tiny_release / "model.sig"
    chain = ("--certificate_chain", authority.file)
    sign_with_certificate(tiny_release, ann.private, certificate)
    done = stock("verify", "certificate", tiny_release, "--signature", signature, *chain)
    assert done.returncode == 0, done.stderr
    signature.unlink()
    key = ("--private_key", ann.private, "--signing_certificate", certificate)
    made = stock("sign", "certificate", tiny_release, "--signature", signature, *key, *chain)
    assert made.returncode == 0, made.stderr
    assert verify_signature(tiny_release, anchors=[read_authority(authority.file)]).signer is not None


def test_sigstore_without_a_network_is_said(tiny_release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything up to asking who signs: the roots of trust come first, and cannot be fetched."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(AdapterHubError, match="Sigstore could not sign: ") as caught:
        sign_with_sigstore(tiny_release)
    assert "key or a certificate" in caught.value.fix
    assert not (tiny_release / "model.sig").exists()


class Issuer(BaseHTTPRequestHandler):
    """An OpenID Connect issuer, as far as a client with a token of its own asks."""

    def do_GET(self) -> None:
        here = f"http://127.0.0.1:{self.server.server_port}"
        body = json.dumps({"authorization_endpoint": f"{here}/auth", "token_endpoint": f"{here}/token"})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_args: object) -> None:
        pass


def test_sigstore_goes_as_far_as_the_identity(tiny_release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the roots that come with Sigstore's client, an identity token that is none is what stops it."""
    from sigstore.models import ClientTrustConfig, SigningConfig

    real = ClientTrustConfig.production
    monkeypatch.setattr(ClientTrustConfig, "production", lambda: real(offline=True))
    with HTTPServer(("127.0.0.1", 0), Issuer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            SigningConfig, "get_oidc_url", lambda _self: f"http://127.0.0.1:{server.server_port}"
        )
        with pytest.raises(AdapterHubError, match="Sigstore could not sign: IdentityError"):
            sign_with_sigstore(tiny_release, identity_token="not-a-token")
        server.shutdown()
    assert not (tiny_release / "model.sig").exists()


def test_a_token_without_the_extra_or_a_module_is_said_without_its_pin(tiny_release: Path) -> None:
    uri = "pkcs11:token=t;object=o?module-name=none&pin-value=8642"
    with pytest.raises(AdapterHubError) as caught:
        sign_with_token(tiny_release, uri)
    assert "8642" not in caught.value.what + caught.value.fix
    assert "PKCS #11" in caught.value.what


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--sigstore", "--key", "k"),
        ("--certificate", "c"),
        ("--key", "k", "--chain", "c"),
    ],
)
def test_one_way_to_sign_is_named(tiny_release: Path, run_cli: RunCli, args: tuple[str, ...]) -> None:
    code, _out, err = run_cli("sign", tiny_release, *args)
    assert code == 2
    assert err.startswith("error: ")


@pytest.fixture
def token(tmp_path: Path, ann: KeyPair, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a SoftHSM token that holds ann's key. Skipped without SoftHSM or the extra."""
    pytest.importorskip("PyKCS11", reason="the pkcs11 extra is not installed")
    util = shutil.which("softhsm2-util")
    found = sorted(Path("/usr/lib").glob("**/softhsm/libsofthsm2.so"))
    if util is None or not found:
        pytest.skip("SoftHSM is not installed (Debian: apt-get install softhsm2)")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    pin = ("--token", "release", "--pin", "8642")
    for args in (
        ("--init-token", "--free", "--label", "release", "--pin", "8642", "--so-pin", "9753"),
        ("--import", str(ann.private), "--label", "signer", "--id", "01", *pin),
    ):
        subprocess.run([util, *args], check=True, capture_output=True, timeout=60)
    return f"pkcs11:token=release;object=signer?module-path={found[0]}&pin-value="


def test_a_key_in_a_token_signs(tiny_release: Path, token: str, ann: KeyPair, run_cli: RunCli) -> None:
    folder = token.partition("module-path=")[2].rpartition("/")[0]
    args = ("sign", tiny_release, "--pkcs11-modules", folder, "--pkcs11")
    code, out, err = run_cli(*args, f"{token}8642")
    assert code == 0, err
    assert ann.fingerprint in out
    assert verify_signature(tiny_release, [ann.public]).signer.fingerprint == ann.fingerprint
    (tiny_release / "model.sig").unlink()
    for uri in (f"{token}1111", f"{token}8642".replace("object=signer", "object=none")):
        code, out, err = run_cli(*args, uri)
        assert (code, "PKCS #11 token cannot be used" in err) == (4, True)
        assert "8642" not in out + err
        assert "1111" not in out + err
    assert not (tiny_release / "model.sig").exists()
