"""keygen, sign, verify."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.commands.targets import find_folder, refuse_cached
from adapterhub.errors import SignatureError

if TYPE_CHECKING:
    from adapterhub.packaging.verification import Checked

PASSWORD_VARIABLE = "ADAPTERHUB_KEY_PASSWORD"


@click.command("keygen")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--passphrase", is_flag=True, help=f"Protect the private key (asks, or reads ${PASSWORD_VARIABLE})."
)
def keygen_command(folder: Path, passphrase: bool) -> None:
    """Make a key pair in DIR: adapterhub.key to sign with, adapterhub.pub to give away.

    The public key also joins your own trusted keys, so that you can verify what you signed.
    """
    from adapterhub.packaging.keys import generate_key, trust_key

    password = _new_password() if passphrase else None
    pair = generate_key(folder, password)
    trusted = trust_key(pair.public)
    click.echo(f"private key  {pair.private}  (keep it to yourself)")
    click.echo(f"public key   {pair.public}")
    click.echo(f"fingerprint  {pair.fingerprint}")
    click.echo(f"added to your trusted keys: {trusted}", err=True)


@click.command("sign")
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Your adapterhub.key.")
@click.option(
    "--certificate", type=click.Path(path_type=Path), help="With --key: its X.509 certificate, in PEM form."
)
@click.option(
    "--chain",
    multiple=True,
    type=click.Path(path_type=Path),
    help="With --certificate: its issuers' certificates; may stand several times.",
)
@click.option("--pkcs11", metavar="URI", help="A key in a PKCS #11 token, by RFC 7512 URI; needs the extra.")
@click.option(
    "--pkcs11-modules",
    "modules",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A folder that holds PKCS #11 modules.",
)
@click.option(
    "--sigstore", is_flag=True, help="No key: Sigstore certifies who you are, in a browser or by CI."
)
@click.option(
    "--identity-token",
    envvar="SIGSTORE_ID_TOKEN",
    show_envvar=True,
    help="With --sigstore: the OpenID Connect token that says who you are.",
)
@click.option(
    "--as", "reviewer", metavar="NAME", help="Add a signature beside the maker's: signatures/NAME.sig."
)
def sign_command(
    release: Path,
    key: Path | None,
    certificate: Path | None,
    chain: tuple[Path, ...],
    pkcs11: str | None,
    modules: tuple[Path, ...],
    sigstore: bool,
    identity_token: str | None,
    reviewer: str | None,
) -> None:
    """Check the files of the folder RELEASE against its manifest, and sign them all (model.sig)."""
    if sum((key is not None, pkcs11 is not None, sigstore)) != 1:
        raise click.UsageError("Name one of --key, --pkcs11 and --sigstore.")
    if (certificate is not None and key is None) or (chain and certificate is None):
        raise click.UsageError("--certificate belongs to --key, and --chain to --certificate.")
    from adapterhub.packaging.keys import is_encrypted
    from adapterhub.packaging.signing import (
        sign_release,
        sign_with_certificate,
        sign_with_sigstore,
        sign_with_token,
    )

    refuse_cached(release)
    if key is not None:
        password = _password_of(key) if is_encrypted(key) else None
        if certificate is not None:
            signer = sign_with_certificate(release, key, certificate, chain, password, reviewer=reviewer)
        else:
            signer = sign_release(release, key, password, reviewer=reviewer)
    elif pkcs11 is not None:
        signer = sign_with_token(release, pkcs11, modules, reviewer=reviewer)
    else:
        signer = sign_with_sigstore(release, identity_token=identity_token, reviewer=reviewer)
    click.echo(f"signed {release / signer.file} with {signer.kind} {signer}")


@click.command("verify")
@click.argument("release", metavar="RELEASE|REF")
@click.option(
    "--key",
    "keys",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A public key that may have signed it; may stand several times.",
)
@click.option(
    "--certificate",
    type=click.Path(path_type=Path),
    help="PEM certificates whose holders may have signed it.",
)
@click.option("--identity", help="A Sigstore identity that may have signed it.")
@click.option(
    "--issuer", metavar="URL", help="With --identity: the OpenID Connect issuer that vouches for it."
)
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify_command(
    release: str,
    keys: tuple[Path, ...],
    certificate: Path | None,
    identity: str | None,
    issuer: str | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Check that RELEASE (a folder, or owner/name[@version]) is unchanged and signed by somebody you trust.

    Whom you trust, your keys and trust files say (`adapterhub trust list`), or the options that name one.
    Exits 4 when a file was changed, added or removed, when it is unsigned, or when the signer is not trusted.
    """
    if (identity is None) != (issuer is None):
        raise click.UsageError("--identity and --issuer belong together.")
    from adapterhub.packaging.anchors import Anchor, TrustedIdentity, read_authority
    from adapterhub.packaging.verification import check_release, verify_signature

    folder = find_folder(release, endpoint)
    anchors: list[Anchor] = [read_authority(certificate)] if certificate is not None else []
    if identity is not None and issuer is not None:
        anchors.append(TrustedIdentity(identity, issuer, Path("--identity")))
    if keys or anchors:
        checked = verify_signature(folder, keys, anchors=anchors)
    else:
        checked = check_release(folder, require_signed=True)
    if as_json:
        click.echo(json.dumps(_verified_json(checked), indent=2))
    else:
        _say_verified(checked)


def _say_verified(checked: Checked) -> None:
    from adapterhub.packaging.verification import NOT_COVERED

    release = checked.release
    manifest = release.manifest
    click.echo(f"{manifest.name} {manifest.version}: the signature holds")
    for signer in checked.signers:
        click.echo(f"signed by    {signer}  ({signer.file}; trusted by {signer.source})")
    for bundle in checked.strangers:
        click.echo(f"also signed  {bundle.name}: by {bundle.claim}, which nothing here vouches for")
    for rule in checked.rules:
        click.echo(f"rule met     {rule.pattern}  ({rule.source})")
    click.echo(
        f"covers       {len(manifest.files)} files, {release.size} bytes, and the manifest: unchanged since"
    )
    for line in NOT_COVERED:
        click.echo(f"not covered  {line}")


def _verified_json(checked: Checked) -> dict[str, object]:
    from adapterhub.packaging.verification import NOT_COVERED

    manifest = checked.release.manifest
    signers = [asdict(signer) | {"source": str(signer.source)} for signer in checked.signers]
    return {
        "verified": True,
        "path": str(checked.release.path),
        "name": manifest.name,
        "version": manifest.version,
        "signer": signers[0],
        "signers": signers,
        "strangers": [{"file": bundle.name, "claims": bundle.claim} for bundle in checked.strangers],
        "rules": [{"publisher": rule.pattern, "file": str(rule.source)} for rule in checked.rules],
        "files": len(manifest.files),
        "bytes": checked.release.size,
        "not_covered": list(NOT_COVERED),
    }


def _new_password() -> str:
    known = os.environ.get(PASSWORD_VARIABLE)
    if known:
        return known
    if not sys.stdin.isatty():
        raise SignatureError(
            "there is no terminal to ask for a passphrase", f"set ${PASSWORD_VARIABLE}, or use a terminal"
        )
    return str(click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True))


def _password_of(key: Path) -> str:
    known = os.environ.get(PASSWORD_VARIABLE)
    if known:
        return known
    if not sys.stdin.isatty():
        raise SignatureError(
            f"{key} is protected by a passphrase", f"set ${PASSWORD_VARIABLE}, or sign in a terminal"
        )
    return str(click.prompt(f"Passphrase of {key}", hide_input=True, err=True))
