"""adapterhub.lock, the file: which release each reference stands for, in TOML."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError, field_validator

from adapterhub.errors import LockError, RefError
from adapterhub.hub.refs import Ref, parse_ref
from adapterhub.packaging.files import MANIFEST_NAME, write_atomic
from adapterhub.packaging.manifest import Commit, Frozen, SemVer, Sha256, parse_version
from adapterhub.packaging.problems import first_problem

LOCK_NAME: Final = "adapterhub.lock"
_MAX_BYTES: Final = 1024 * 1024
_HEADER: Final = """\
# Made by `adapterhub lock`, and meant to be committed: the releases that `adapterhub pull --locked` and
# load_adapter(…, locked=True) take, and nothing else. `adapterhub lock` without a name brings all up to date.
"""


class LockedBase(Frozen):
    """The base model of a locked release."""

    name: str
    revision: Commit | None = None
    """Its commit on the Hub; absent for a base that was a local folder."""
    digest: Sha256
    """The base digest."""


class LockedRelease(Frozen):
    """One release, pinned."""

    version: SemVer
    tag: str | None = None
    """The version tag that it was found by; absent for a branch, a commit, or where there are no versions."""
    commit: Commit
    manifest_sha256: Sha256
    signers: tuple[str, ...] = ()
    """Who signed it, as far as they were trusted where it was locked: see ``hub.lock.identify``."""
    base: LockedBase | None = None


class LockFile(Frozen):
    """The content of adapterhub.lock."""

    schema_version: Literal[1] = 1
    releases: dict[str, LockedRelease] = Field(default_factory=dict)
    """By reference, as it is asked for: ``owner/name`` or ``owner/name@revision``."""

    @field_validator("releases", mode="before")
    @classmethod
    def _are_references(cls, value: object) -> object:
        for name in value if isinstance(value, dict) else ():
            try:
                written = str(parse_ref(name))
            except RefError as err:
                raise ValueError(err.what) from err
            if written != name:
                raise ValueError(f"{name!r} is written {written!r}")
        return value

    @classmethod
    def from_bytes(cls, data: bytes, where: str = LOCK_NAME) -> LockFile:
        """Parse a lock file; ``where`` names it in the error. Raises LockError for anything that is none."""
        fix = "take it from your version control again, or remove it and run `adapterhub lock REF`"
        if len(data) > _MAX_BYTES:
            raise LockError(f"{where} is over {_MAX_BYTES} bytes", fix)
        try:
            content = tomllib.loads(data.decode())
        except (ValueError, RecursionError) as err:
            raise LockError(f"{where} is not TOML in UTF-8: {' '.join(str(err).split())}", fix) from err
        version = content.get("schema_version", 1)
        if type(version) is not int or version < 1:
            raise LockError(f"{where}: schema_version {version!r} is no whole number from 1", fix)
        if version > 1:
            raise LockError(
                f"{where} has schema version {version}; this adapterhub reads up to 1",
                "upgrade: pip install -U adapterhub",
            )
        try:
            lock = cls.model_validate(content)
        except ValidationError as err:
            key, words = first_problem(err)
            raise LockError(f"{where}: {key}: {words}", fix) from err
        if "schema_version" not in content:
            raise LockError(f"{where} has no schema_version", fix)
        return lock

    @classmethod
    def read(cls, path: Path) -> LockFile:
        """Read a lock file. Raises LockError when it is missing or malformed."""
        if not path.is_file():
            raise LockError(f"there is no {path}", "make it: `adapterhub lock OWNER/NAME`, in that folder")
        with path.open("rb") as file:
            return cls.from_bytes(file.read(_MAX_BYTES + 1), str(path))

    def to_bytes(self) -> bytes:
        """As it is written: TOML, UTF-8, by reference, so that a change is a small diff."""
        import tomli_w

        content = self.model_dump(mode="json", exclude_none=True)
        content["releases"] = dict(sorted(content["releases"].items()))
        return (_HEADER + tomli_w.dumps(content)).encode()

    def find(self, ref: Ref) -> LockedRelease | None:
        """The entry of ``ref`` itself, or one of its repository that is at the version or commit named."""
        exact = self.releases.get(str(ref))
        if exact is not None or ref.revision is None:
            return exact
        return next(
            (
                entry
                for name, entry in self.releases.items()
                if parse_ref(name).repo == ref.repo and ref.revision in (entry.tag, entry.commit)
            ),
            None,
        )

    def known_version(self, ref: Ref) -> str | None:
        """The version below which ``ref`` may not fall: its own entry's, or the highest of its repository."""
        exact = self.find(ref)
        if exact is not None:
            return exact.version
        versions = [
            entry.version for name, entry in self.releases.items() if parse_ref(name).repo == ref.repo
        ]
        return max(versions, key=parse_version, default=None)


def find_lock(locked: bool | str | Path) -> Path:
    """The lock file that ``locked`` names; True: that beside the running program, else in this folder."""
    if not isinstance(locked, bool):
        path = Path(locked)
        return path / LOCK_NAME if path.is_dir() else path
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    beside = Path(program).resolve().parent / LOCK_NAME if program else Path(LOCK_NAME)
    return beside if beside.is_file() else Path(LOCK_NAME)


def write_lock(path: Path, entries: Mapping[str, LockedRelease]) -> LockFile:
    """Put ``entries`` into the lock file, beside what stands there; made when missing, written whole.

    Raises LockError when the file is malformed, or would lie inside a release.
    """
    folder = path.absolute().parent
    if (folder / MANIFEST_NAME).is_file():
        raise LockError(
            f"{folder} is a release, which a lock file would break", "run it in your project's folder"
        )
    lock = LockFile.read(path) if path.exists() else LockFile()
    lock = LockFile(releases={**lock.releases, **entries})
    write_atomic(path, lock.to_bytes())
    return lock
