"""What a push does to each file of a repository: the release here against the head of a branch there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapterhub.errors import ManifestError
from adapterhub.hub.client import RepoType
from adapterhub.hub.held import HeldFile
from adapterhub.hub.refs import Ref
from adapterhub.hub.snapshots import HubFile, download, snapshot_folder
from adapterhub.packaging.bundles import is_signature, signature_files
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.release import Release

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Change = Literal["new", "changed", "unchanged", "deleted"]


@dataclass(frozen=True)
class FileChange:
    """What a push does to one file of the repository."""

    name: str
    size: int
    """Bytes; of what goes away when it is deleted."""
    change: Change


@dataclass(frozen=True)
class Head:
    """What the branch holds."""

    commit: str | None
    """None when there is no repository yet."""
    files: Mapping[str, HubFile]
    tags: Mapping[str, str]
    has_branch: bool
    """False when ``commit`` is main's, from which the branch is to be made."""
    branches: frozenset[str]
    """The commits that the repository's branches end in."""


def repo_type_of(release: Release) -> RepoType:
    """Which type of repository holds releases of this kind."""
    return "dataset" if release.manifest.kind == "dataset" else "model"


def compare_files(
    api: HfApi, ref: Ref, release: Release, head: Head, held: Mapping[str, HeldFile] | None = None
) -> tuple[tuple[FileChange, ...], tuple[str, ...]]:
    """What becomes of each file, and which files of the repository stay though no release lists them.

    ``held`` are small files of the release as they were checked: they are not read again.
    Raises HubError and its kinds.
    """
    ours = names_of(release)
    listed = _listed_at(api, ref, release, head)
    changes = [change_of(release, name, head.files.get(name), held) for name in ours]
    changes += [FileChange(name, head.files[name].size, "deleted") for name in listed if name not in ours]
    kept = [
        name for name in head.files if name not in listed and name not in ours and name != ".gitattributes"
    ]
    return tuple(sorted(changes, key=lambda change: change.name)), tuple(sorted(kept))


def names_of(release: Release) -> set[str]:
    """All files that are pushed: those listed, the manifest, the signatures."""
    return {*release.manifest.files, MANIFEST_NAME, *signature_files(release.path)}


def _listed_at(api: HfApi, ref: Ref, release: Release, head: Head) -> set[str]:
    """The files that belong to the release at the head of the branch, if there is one that can be read."""
    if head.commit is None or MANIFEST_NAME not in head.files:
        return set()
    if head.files[MANIFEST_NAME].is_content_of(release.path / MANIFEST_NAME):
        return names_of(release) & set(head.files)
    repo_type = repo_type_of(release)
    download(api, ref, head.commit, [MANIFEST_NAME], repo_type)
    try:
        manifest = Manifest.read(snapshot_folder(ref, head.commit, repo_type))
    except ManifestError:  # nobody can tell what belongs to it, so nothing of it is deleted
        return {MANIFEST_NAME}
    return {name for name in head.files if name in (*manifest.files, MANIFEST_NAME) or is_signature(name)}


def change_of(
    release: Release, name: str, there: HubFile | None, held: Mapping[str, HeldFile] | None = None
) -> FileChange:
    """What becomes of a file of the release; ``there`` is what the repository holds under its name."""
    path, entry = release.path / name, release.manifest.files.get(name)
    size = entry.size if entry is not None else path.stat().st_size  # a listed one's was checked already
    if there is None:
        return FileChange(name, size, "new")
    if there.sha256 is not None and entry is not None:  # and its digest
        same = there.sha256 == entry.sha256
    elif there.sha256 is None and held is not None and name in held:
        same = there.blob == held[name].blob
    else:
        same = there.is_content_of(path)
    return FileChange(name, size, "unchanged" if same else "changed")
