"""A release's next version: decided by what changed since its parent, and written into the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapterhub.errors import ReleaseError, VersionError
from adapterhub.packaging.behaviour import Change, Level, check_level, demanded, find_changes, next_version
from adapterhub.packaging.files import fsync_folder, write_atomic
from adapterhub.packaging.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, Parent, parse_version
from adapterhub.packaging.release import Release


@dataclass(frozen=True)
class Bump:
    """What the next version of a release is, and why."""

    version: str
    level: Level
    """What was raised of the parent's version."""
    demanded: Level | None
    """What the changes ask for; None when there are none."""
    changes: tuple[Change, ...]
    parent: Parent


def plan_bump(release: Release, parent: Release, ref: str, level: Level | Literal["auto"]) -> Bump:
    """Decide the version that follows ``parent``, which ``ref`` names, by what ``release`` changed.

    The caller has checked the files of both. Raises VersionError when ``level`` is too little for the
    changes, when ``auto`` finds none, and when the release's own version is above the result; ReleaseError
    for a merged release, whose version is its adapter's.
    """
    if release.manifest.kind in ("merged", "quantized"):
        raise ReleaseError(
            f"{release.path} is a {release.manifest.kind} release: its version is that of its adapter",
            "bump the adapter release, and merge it again",
        )
    if release.digest == parent.digest:
        raise VersionError(
            f"{release.path} is its parent {ref} itself", f"name the release that {ref} was changed into"
        )
    changes = find_changes(parent, release)
    needed = demanded(changes)
    if level == "auto":
        if needed is None:
            raise VersionError(
                f"nothing changed between {ref} and {release.path}", "say major, minor or patch yourself"
            )
        chosen = needed
    else:
        check_level(level, changes)
        chosen = level
    version = next_version(parent.manifest.version, chosen)
    if parse_version(release.manifest.version) > parse_version(version):
        raise VersionError(
            f"{release.path} is {release.manifest.version} already, above {version}, which follows {ref}",
            f"name with --parent the release before it, or bump more than {chosen}",
        )
    return Bump(version, chosen, needed, changes, Parent(ref=ref, manifest_sha256=parent.digest))


def apply_bump(release: Release, bump: Bump) -> Release:
    """Write version and parent into the manifest; the signature, which they break, is removed before."""
    update = {"version": bump.version, "parent": bump.parent}
    manifest = Manifest.from_bytes(release.manifest.model_copy(update=update).to_bytes())
    if manifest == release.manifest:
        return release
    (release.path / SIGNATURE_NAME).unlink(missing_ok=True)
    fsync_folder(release.path)
    write_atomic(release.path / MANIFEST_NAME, manifest.to_bytes())
    return Release(release.path, manifest)
