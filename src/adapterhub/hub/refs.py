"""References to what lies on a Hub: ``owner/name`` or ``owner/name@revision``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from adapterhub.errors import RefError, VersionError
from adapterhub.packaging.manifest import parse_version

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_NAME}/{_NAME}")
_MAX_REPO_CHARS = 96  # huggingface_hub's own limit for owner and name together
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What git allows in a branch or tag, less everything outside ASCII; of full refs, those that a Hub has.
_REVISION = re.compile(
    r"(?!refs/)[A-Za-z0-9_][A-Za-z0-9_./+-]{0,199}|refs/pr/[1-9][0-9]{0,8}|refs/convert/[a-z]{1,32}"
)
_LINE = re.compile(r"v?(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))?")
_FORM = "write owner/name or owner/name@revision, like ada/orders@v1.2.0"


LATEST: Final = "latest"
"""As a revision: the highest version, whatever tag or branch is called so."""


@dataclass(frozen=True)
class Ref:
    """A repository, and which state of it."""

    repo: str
    """``owner/name``."""
    revision: str | None
    """A version tag (``v1.2.0``), another tag, a branch, ``refs/pr/N``, a commit of 40 hex digits, or
    None."""

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which nothing moves."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def version(self) -> str | None:
        """The version that the revision names (``1.2.0``), or None when it is no version tag."""
        return version_of(self.revision) if self.revision is not None else None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_ref(text: str) -> Ref:
    """Read ``owner/name[@revision]``.

    A semantic version, with or without its ``v``, names the version tag: ``@1.2.0`` is ``v1.2.0``. Raises
    RefError for anything that is no name on a Hub: spaces, ``..``, ``--``, a second ``@``, an absolute path,
    other characters.
    """
    repo, at, revision = text.partition("@")
    if not _REPO.fullmatch(repo) or len(repo) > _MAX_REPO_CHARS or not _is_plain(repo) or "--" in repo:
        raise RefError(f"{text!r} names no repository on a Hub", _FORM)
    if not at:
        return Ref(repo, None)
    version = version_of(revision)
    if version is not None:
        return Ref(repo, tag_of(version))
    if not _REVISION.fullmatch(revision) or not _is_plain(revision):
        raise RefError(f"{text!r}: {revision!r} is no branch, tag, version or commit", _FORM)
    return Ref(repo, revision)


def looks_like_path(text: str) -> bool:
    """Whether ``text`` can only mean a path here: it starts with ``.``, ``/`` or ``~``, ends with ``/``, or
    its part before an ``@`` holds more than one ``/``."""
    return text.startswith((".", "/", "~")) or text.endswith("/") or text.partition("@")[0].count("/") > 1


def tag_of(version: str) -> str:
    """The tag that marks a version on a Hub: ``v1.2.0`` for ``1.2.0``."""
    return f"v{version}"


def version_of(name: str) -> str | None:
    """The version in a tag's name, ``1.2.0`` for ``v1.2.0`` or ``1.2.0``; None when the name is no
    version."""
    try:
        parse_version(name)
    except VersionError:
        return None
    return name.removeprefix("v")


def highest_version(tags: Iterable[str]) -> str | None:
    """The tag of the highest version, a pre-release only if there is nothing else; None without
    version tags."""
    versions = {parse_version(tag): tag for tag in tags if tag.startswith("v") and version_of(tag)}
    stable = [version for version in versions if not version.is_prerelease]
    return versions[max(stable or versions)] if versions else None


def newest_of_line(line: str, tags: Iterable[str]) -> str | None:
    """The tag of the highest version in a line of versions: ``v1.3.0`` for ``v1`` or ``1.3``.

    None when ``line`` names no line, or there is no version of it.
    """
    if not _LINE.fullmatch(line):
        return None
    prefix = f"v{line.removeprefix('v')}."
    return highest_version(tag for tag in tags if tag.startswith(prefix))


def _is_plain(path: str) -> bool:
    """Whether no part of a path is empty, starts with a dot or ends in a way that git keeps for itself."""
    return ".." not in path and all(
        part and not part.startswith(".") and not part.endswith((".", ".git", ".lock"))
        for part in path.split("/")
    )
