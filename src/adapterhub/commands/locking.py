"""lock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.errors import LockError

if TYPE_CHECKING:
    from adapterhub.hub.lockfile import LockedRelease, LockFile


@click.command("lock")
@click.argument("refs", metavar="[OWNER/NAME[@VERSION]]...", nargs=-1)
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option(
    "--key",
    "keys",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A public key to accept beside your trusted keys; may stand several times.",
)
@click.option("--require-signed", is_flag=True, help="Refuse what nobody you trust has signed.")
@click.option("--allow-downgrade", is_flag=True, help="Take an older version than is locked.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def lock_command(
    refs: tuple[str, ...],
    endpoint: str | None,
    keys: tuple[Path, ...],
    require_signed: bool,
    allow_downgrade: bool,
    as_json: bool,
) -> None:
    """Write into adapterhub.lock, in this folder, what each reference names now; without one, of all there.

    Each is pulled and checked; version, commit, manifest digest, signer and base are written down. Commit the
    file: `pull --locked` and load_adapter(…, locked=True) then take exactly that.
    """
    from adapterhub.hub.lock import lock_release
    from adapterhub.hub.lockfile import LOCK_NAME, LockFile, write_lock
    from adapterhub.hub.refs import parse_ref

    path = Path(LOCK_NAME)
    before = LockFile.read(path) if path.exists() or not refs else LockFile()
    wanted = list(dict.fromkeys(str(parse_ref(ref)) for ref in refs)) or list(before.releases)
    if not wanted:
        raise LockError(f"{path} locks nothing yet", "name what to lock: `adapterhub lock OWNER/NAME`")
    entries = {}
    for ref in wanted:
        name, entry = lock_release(
            ref,
            before,
            endpoint=endpoint,
            keys=keys,
            require_signed=require_signed,
            allow_downgrade=allow_downgrade,
        )
        entries[name] = entry
    write_lock(path, entries)
    _say_locked(before, entries)
    if as_json:
        click.echo(json.dumps({name: _as_dict(entry) for name, entry in entries.items()}, indent=2))
        return
    for name, entry in entries.items():
        click.echo(f"{name}  {entry.version}  {entry.commit}")


def _say_locked(before: LockFile, entries: dict[str, LockedRelease]) -> None:
    for name, entry in entries.items():
        old = before.releases.get(name)
        if old == entry:
            what = "as it was"
        elif old is None:
            what = "new"
        else:
            what = f"{old.version} became {entry.version}"
        signed = f"signed by {', '.join(entry.signers)}" if entry.signers else "signed by nobody you trust"
        click.echo(f"{name}: {what}, {signed}", err=True)


def _as_dict(entry: LockedRelease) -> dict[str, Any]:
    return entry.model_dump(mode="json")
