"""A release's ancestors, from parent to parent, each held to the digest that its child recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub.errors import AuthError, ManifestError, RefError, SignatureError
from adapterhub.hub.client import connect, list_tags, resolve
from adapterhub.hub.refs import Ref, parse_ref, version_of
from adapterhub.hub.snapshots import download, snapshot_folder
from adapterhub.packaging.files import sha256_file
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest, Parent, parse_version

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Ancestor:
    """A release that another one follows, or was made from."""

    ref: str
    """As its child names it."""
    digest: str
    """sha256 of its manifest, as its child recorded it."""
    commit: str | None
    """Where the Hub has it, 40 hex digits."""
    manifest: Manifest | None
    """None when it could not be looked at."""
    problem: str | None
    """Why it could not be."""


def trace(
    parent: Parent | None, *, endpoint: str | None = None, token: str | None = None
) -> Iterator[Ancestor]:
    """The ancestors that begin with ``parent``, the youngest first; only their manifests are downloaded.

    Ends with the first release, or with one that could not be looked at: named by a folder, removed, or not
    readable with this token. A circle cannot be: each manifest holds the digest of the one before. Raises
    SignatureError when the Hub holds another manifest under a name than its child recorded, HubError.
    """
    api = connect(endpoint, token)
    while parent is not None:
        ancestor = _look_up(api, parent)
        yield ancestor
        parent = ancestor.manifest.parent if ancestor.manifest else None


def list_versions(repo: str, *, endpoint: str | None = None, token: str | None = None) -> list[str]:
    """The versions that a repository on the Hub has tags of, the highest first. Raises RefError, HubError."""
    tags = list_tags(connect(endpoint, token), Ref(repo, None))
    versions = [version_of(tag) for tag in tags if tag.startswith("v")]
    return sorted((version for version in versions if version), key=parse_version, reverse=True)


def _look_up(api: HfApi, parent: Parent) -> Ancestor:
    digest = parent.manifest_sha256
    if "/" not in parent.ref:
        return Ancestor(
            parent.ref, digest, None, None, "known by name and digest: it was no release on a Hub"
        )
    try:
        ref = parse_ref(parent.ref)
        commit = resolve(api, ref).commit
        download(api, ref, commit, [MANIFEST_NAME])
        folder = snapshot_folder(ref, commit)
        manifest = Manifest.read(folder)
    except (AuthError, RefError, ManifestError) as err:
        return Ancestor(parent.ref, digest, None, None, err.what)
    if sha256_file(folder / MANIFEST_NAME) != digest:
        raise SignatureError(
            f"{parent.ref} is not the release that its successor names (manifest digest {digest[:12]}…)",
            "the version was moved, or the successor's maker names another: ask both",
        )
    return Ancestor(parent.ref, digest, commit, manifest, None)
