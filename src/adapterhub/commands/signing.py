"""keygen, sign, verify."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from adapterhub.commands.targets import find_folder, refuse_cached
from adapterhub.errors import SignatureError

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
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Your adapterhub.key.")
def sign_command(release: Path, key: Path) -> None:
    """Check the files of the folder RELEASE against its manifest, and sign them all (model.sig)."""
    from adapterhub.packaging.keys import is_encrypted
    from adapterhub.packaging.manifest import SIGNATURE_NAME
    from adapterhub.packaging.signing import sign_release

    refuse_cached(release)
    signer = sign_release(release, key, _password_of(key) if is_encrypted(key) else None)
    click.echo(f"signed {release / SIGNATURE_NAME} with key {signer.fingerprint}")


@click.command("verify")
@click.argument("release", metavar="RELEASE|REF")
@click.option(
    "--key",
    "keys",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A public key that may have signed it; may stand several times. Default: your trusted keys.",
)
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify_command(release: str, keys: tuple[Path, ...], endpoint: str | None, as_json: bool) -> None:
    """Check that RELEASE (a folder, or owner/name[@version]) is unchanged and signed by a key you trust.

    Exits 4 when a file was changed, added or removed, when it is unsigned, or when the signer is not trusted.
    """
    from adapterhub.packaging.keys import trusted_keys
    from adapterhub.packaging.release import Release
    from adapterhub.packaging.signing import NOT_COVERED, verify_signature

    folder = find_folder(release, endpoint)
    signer = verify_signature(folder, keys or trusted_keys())
    verified = Release.open(folder)
    manifest = verified.manifest
    if as_json:
        result = {
            "verified": True,
            "path": str(folder),
            "name": manifest.name,
            "version": manifest.version,
            "signer": {"fingerprint": signer.fingerprint, "key": str(signer.key)},
            "files": len(manifest.files),
            "bytes": verified.size,
            "not_covered": list(NOT_COVERED),
        }
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(f"{manifest.name} {manifest.version}: the signature holds")
    click.echo(f"signed by    {signer.fingerprint}  ({signer.key})")
    click.echo(
        f"covers       {len(manifest.files)} files, {verified.size} bytes, and the manifest: unchanged since"
    )
    for line in NOT_COVERED:
        click.echo(f"not covered  {line}")


def _new_password() -> str:
    known = os.environ.get(PASSWORD_VARIABLE)
    return known or str(click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True))


def _password_of(key: Path) -> str:
    known = os.environ.get(PASSWORD_VARIABLE)
    if known:
        return known
    if not sys.stdin.isatty():
        raise SignatureError(
            f"{key} is protected by a passphrase", f"set ${PASSWORD_VARIABLE}, or sign in a terminal"
        )
    return str(click.prompt(f"Passphrase of {key}", hide_input=True, err=True))
