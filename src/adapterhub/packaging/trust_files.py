"""Trust files written: entries added and removed, everything else in the file left as its owner wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapterhub.errors import SignatureError
from adapterhub.packaging.files import write_atomic
from adapterhub.packaging.trust import Entry, read_trust_file

_HEAD = "# Whose signatures are trusted: https://github.com/adapterhub/adapterhub/blob/main/docs/trust.md\n"


def add_entry(path: Path, entry: Entry) -> bool:
    """Add an entry to the trust file at ``path``, made if missing; False when it holds the same already.

    The file is replaced whole or not at all; comments in it stay. Raises SignatureError when it is malformed.
    """
    import tomlkit

    if path.exists() and entry in read_trust_file(path).trust:
        return False
    document = _read(path)
    table = tomlkit.table()
    for name, value in entry.model_dump(exclude_none=True).items():
        if name != "role" or value != "maker":
            table[name] = tomlkit.string(value, multiline="\n" in value)
    entries = document.get("trust")
    if entries is None:
        entries = document["trust"] = tomlkit.aot()
    entries.append(table)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, tomlkit.dumps(document).encode())
    return True


def remove_entries(path: Path, entries: list[Entry]) -> None:
    """Remove ``entries`` from the trust file at ``path``, in which they stand."""
    import tomlkit

    document = _read(path)
    kept = [
        table for table in document.get("trust", []) if Entry.model_validate(table.unwrap()) not in entries
    ]
    if kept:
        document["trust"] = tomlkit.aot()
        for table in kept:
            document["trust"].append(table)
    else:
        del document["trust"]
    write_atomic(path, tomlkit.dumps(document).encode())


def matching_entries(path: Path, what: str) -> list[Entry]:
    """The entries of a trust file that ``what`` names: a publisher, a fingerprint's first 8 digits or more,
    an identity, or a certificate's subject. Raises SignatureError when the file is malformed."""
    return [entry for entry in read_trust_file(path).trust if _is_named(entry, what)]


def _is_named(entry: Entry, what: str) -> bool:
    fingerprint = entry.fingerprint or ""
    by_fingerprint = len(what) >= 8 and fingerprint.startswith(what.lower())
    return by_fingerprint or what in (entry.publisher, entry.identity, entry.subject)


def _read(path: Path) -> Any:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        return tomlkit.parse(
            path.read_text(encoding="utf-8") if path.exists() else f"{_HEAD}schema_version = 1\n"
        )
    except TOMLKitError as err:
        raise SignatureError(f"{path} is not valid TOML: {err}", "mend it, or remove it") from err
