"""``adapterhub trust …``: whose signatures are trusted, for which publishers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.errors import AdapterHubError, SignatureError

if TYPE_CHECKING:
    from adapterhub.packaging.trust import Entry

_PROJECT = click.option(
    "--project", is_flag=True, help="The project's adapterhub-trust.toml instead of your own trust.toml."
)


@click.group("trust")
def trust_command() -> None:
    """Say whose signatures you trust: for all releases, or as a rule for one publisher."""


@trust_command.command("add")
@click.argument("publisher", metavar="[OWNER/NAME]", required=False)
@click.option("--key", type=click.Path(path_type=Path), help="A public key file.")
@click.option("--certificate", type=click.Path(path_type=Path), help="PEM certificates of an authority.")
@click.option("--subject", help="With --certificate: what the signer's must be issued to.")
@click.option("--identity", help="A Sigstore identity: an e-mail address or a workflow's URI.")
@click.option(
    "--issuer", metavar="URL", help="With --identity: the OpenID Connect issuer that vouches for it."
)
@click.option("--from", "source", metavar="RELEASE|REF", help="Whoever signed this release (asks first).")
@click.option("--reviewer", is_flag=True, help="One of its reviewers, who must have signed beside a maker.")
@_PROJECT
@click.option("--yes", is_flag=True, help="With --from: trust the fingerprint without asking.")
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
def add_command(
    publisher: str | None,
    key: Path | None,
    certificate: Path | None,
    subject: str | None,
    identity: str | None,
    issuer: str | None,
    source: str | None,
    reviewer: bool,
    project: bool,
    yes: bool,
    endpoint: str | None,
) -> None:
    """Trust a key, a certificate authority or a Sigstore identity.

    With OWNER/NAME (or 'OWNER/*', or '*' for everything) it is a rule: what that publisher released must be
    signed so, or `pull` and `load_adapter` refuse it. Without, such signatures are accepted wherever no rule
    speaks.
    """
    given = [it for it in (key, certificate, identity, source) if it is not None]
    if len(given) != 1:
        raise click.UsageError("Name one of --key, --certificate, --identity and --from.")
    if (identity is None) != (issuer is None):
        raise click.UsageError("--identity and --issuer belong together.")
    from adapterhub.packaging.keys import trust_key

    if source is not None:
        entry = _entry_of(source, endpoint, publisher, reviewer)
        _confirm(entry, source, yes)
    else:
        if key is not None and publisher is None and not project and not reviewer:
            click.echo(f"trusted {trust_key(key)}")
            return
        entry = _entry(
            publisher=publisher,
            role="reviewer" if reviewer else "maker",
            key=_public_key_text(key) if key else None,
            certificate=_text_of(certificate) if certificate else None,
            subject=subject,
            identity=identity,
            issuer=issuer,
        )
    _add(entry, project)


@trust_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the entries as JSON.")
def list_command(as_json: bool) -> None:
    """Print what you and the project in this folder trust, and in which file it stands."""
    from adapterhub.packaging.keys import fingerprint, trusted_keys
    from adapterhub.packaging.trust import Policy

    rows = [
        {"publisher": entry.publisher, "role": entry.role, "trusts": entry.words, "file": str(path)}
        for path, content in Policy.read().files
        for entry in content.trust
    ]
    rows += [
        {"publisher": None, "role": "maker", "trusts": f"key {fingerprint(path)}", "file": str(path)}
        for path in trusted_keys()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['publisher'] or '(no rule)':<24} {row['role']:<8} {row['trusts']}")
        click.echo(f"{'':<24} {'':<8} {row['file']}")
    if not rows:
        click.echo("nothing is trusted yet: `adapterhub trust add` says how", err=True)


@trust_command.command("remove")
@click.argument("what", metavar="OWNER/NAME|FINGERPRINT|IDENTITY")
@_PROJECT
def remove_command(what: str, project: bool) -> None:
    """Trust no longer: a publisher's whole rule, a key or certificate by its fingerprint, an identity."""
    from adapterhub.packaging.keys import fingerprint, trusted_keys
    from adapterhub.packaging.trust_files import matching_entries, remove_entries

    path = _file(project)
    entries = matching_entries(path, what) if path.exists() else []
    named = [] if project or len(what) < 8 else trusted_keys()
    keys = [it for it in named if fingerprint(it).startswith(what.lower())]
    if not entries and not keys:
        raise AdapterHubError(f"nothing in {path} is named {what!r}", "see `adapterhub trust list`")
    if entries:
        remove_entries(path, entries)
    for entry in entries:
        click.echo(f"removed {entry.publisher or '(no rule)'}: {entry.words}")
    for it in keys:
        it.unlink()
        click.echo(f"removed {it}")


def _entry_of(source: str, endpoint: str | None, publisher: str | None, reviewer: bool) -> Entry:
    """An entry for whoever signed a release, whose signature is found to hold."""
    from adapterhub.commands.targets import find_folder
    from adapterhub.packaging.bundles import SIGNATURE_NAME, read_bundle, signature_files
    from adapterhub.packaging.verification import verify_signature

    folder = find_folder(source, endpoint)
    role = "reviewer" if reviewer else "maker"
    names = [name for name in signature_files(folder) if (name != SIGNATURE_NAME) == reviewer]
    if not names:
        raise SignatureError(
            f"{source} is not signed by a {role}: there is nothing to trust", f"ask its {role} to sign it"
        )
    if len(names) > 1:
        raise SignatureError(
            f"{source} is signed by {len(names)} reviewers: {', '.join(names[:3])}",
            "name the key of the one that you mean: --key FILE",
        )
    bundle = read_bundle(folder, names[0])
    if bundle.public_pem is None:
        raise SignatureError(
            f"{bundle.path} was made with {bundle.claim} and does not hold it",
            f"ask its {role} for the public key (--key), the authority (--certificate) or the identity",
        )
    entry = _entry(publisher=publisher, role=role, key=bundle.public_pem.decode())
    verify_signature(folder, anchors=[entry.anchor(bundle.path)])
    return entry


def _confirm(entry: Entry, source: str, yes: bool) -> None:
    """Have somebody agree to a key that came with what it signed."""
    whom = entry.publisher or "whatever it signed, where no rule speaks"
    how = "signed" if entry.role == "maker" else "reviewed, and signed,"
    click.echo(f"{source} is {how} with the {entry.words}", err=True)
    click.echo("that it is its owner's key, nothing here shows: compare it over another channel", err=True)
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise SignatureError(
            f"the key {str(entry.fingerprint)[:16]}… was not confirmed", "compare it, then add --yes"
        )
    if not click.confirm(f"Trust it for {whom}?", err=True):
        raise SignatureError(
            f"the key {str(entry.fingerprint)[:16]}… is not trusted: you said no",
            "compare it with what its owner says, and run the same command again",
        )


def _add(entry: Entry, project: bool) -> None:
    from adapterhub.packaging.trust_files import add_entry

    path = _file(project)
    added = add_entry(path, entry)
    how = "signed" if entry.role == "maker" else "reviewed, and signed,"
    whom = f"{entry.publisher} must be {how} by" if entry.publisher else "accepted where no rule speaks:"
    click.echo(f"{'added' if added else 'there already'}: {whom} {entry.words}")
    click.echo(f"in {path}", err=True)


def _file(project: bool) -> Path:
    from adapterhub.packaging.trust import PROJECT_NAME, find_project_file, user_file

    return (find_project_file() or Path.cwd() / PROJECT_NAME) if project else user_file()


def _entry(**fields: str | None) -> Entry:
    from pydantic import ValidationError

    from adapterhub.packaging.problems import first_problem
    from adapterhub.packaging.trust import Entry

    try:
        return Entry.model_validate(fields)
    except ValidationError as err:
        raise SignatureError(
            f"that cannot be trusted: {first_problem(err)[1]}", "see `adapterhub trust add --help`"
        ) from err


def _public_key_text(path: Path) -> str:
    from adapterhub.packaging.keys import public_pem, read_public_key

    return public_pem(read_public_key(path)).decode()


def _text_of(path: Path) -> str:
    """A certificate file's text; a private key in it is never copied."""
    from adapterhub.packaging.anchors import read_authority

    text = path.read_text(encoding="ascii", errors="replace")
    if "PRIVATE KEY-----" in text:
        raise SignatureError(f"{path} holds a private key", "name a file with certificates alone")
    read_authority(path)  # names the file when it holds no certificate
    return text
