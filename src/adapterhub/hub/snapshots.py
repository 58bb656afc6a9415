"""Some files of one commit in the Hugging Face cache, checked against the digests that the Hub lists."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import HubError
from adapterhub.hub.client import RepoType, hub_errors, repo_cache
from adapterhub.hub.contents import Content
from adapterhub.hub.downloads import check_space, download_contents, missing_bytes
from adapterhub.hub.records import read_record, write_record
from adapterhub.hub.refs import Ref
from adapterhub.hub.tally import Progress
from adapterhub.packaging.files import check_relative_path, sha256_file
from adapterhub.packaging.files import list_files as list_names

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SHA256_CHARS, _SHA1_CHARS = 64, 40


@dataclass(frozen=True)
class HubFile:
    """One file of a commit, as the Hub lists it."""

    size: int
    """Bytes."""
    blob: str
    """git's name for the content (sha1 of a header and the bytes); of the pointer when the file is a large
    one."""
    sha256: str | None
    """Of the content, for the large files that git does not hold itself."""

    @property
    def content(self) -> Content:
        """What it must turn out to be when it is fetched."""
        return Content(self.size, self.sha256, None if self.sha256 is not None else self.blob)

    def is_content_of(self, path: Path) -> bool:
        """Whether the file at ``path`` has this content, by size, then by digest."""
        if path.stat().st_size != self.size:
            return False
        return sha256_file(path) == self.sha256 if self.sha256 is not None else _git_blob(path) == self.blob


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit, in the cache and checked."""

    folder: Path
    """The commit's folder in the cache; it may hold more than ``digests`` names."""
    commit: str
    digests: Mapping[str, str]
    """sha256 by file."""


def list_files(api: HfApi, ref: Ref, commit: str, repo_type: RepoType = "model") -> dict[str, HubFile]:
    """Every file of a commit on the Hub. Raises RefError, AuthError, HubError; HubError for a hostile file
    name."""
    from huggingface_hub.hf_api import RepoFile

    found = {}
    with hub_errors(api, ref):
        for entry in api.list_repo_tree(ref.repo, recursive=True, revision=commit, repo_type=repo_type):
            if isinstance(entry, RepoFile):
                try:
                    name = check_relative_path(entry.path)
                except ValueError as err:
                    raise HubError(f"{ref} holds {err}", "do not use this repository") from err
                large = entry.lfs.sha256 if entry.lfs is not None else None
                found[name] = HubFile(entry.size, entry.blob_id, large)
    return found


def download(
    api: HfApi,
    ref: Ref,
    commit: str,
    names: Iterable[str],
    repo_type: RepoType = "model",
    listed: Mapping[str, HubFile] | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Bring ``names`` of a commit into the cache, those that are not there yet, as `snapshot_folder` shows.

    Asks the Hub nothing when all are there. ``listed`` is the commit's listing, if that is known already.
    Every file is checked by its digest before it gets its name; a later run goes on where one was cut off.
    A name that the commit has not is left out. Returns the sha256 of the files that were fetched, by name.
    Raises AdapterHubError for a disk that is too small, OSError for a full one, RefError, AuthError,
    HubError.
    """
    cache = repo_cache(ref.repo, repo_type)
    folder = snapshot_folder(ref, commit, repo_type)
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return {}
    if listed is None:
        listed = list_files(api, ref, commit, repo_type)
    contents = {name: listed[name].content for name in missing if name in listed}
    if not contents:
        return {}
    check_space(cache, sum(missing_bytes(cache, content) for content in contents.values()))
    return download_contents(api, ref, commit, contents, repo_type, progress)


def snapshot_folder(ref: Ref, commit: str, repo_type: RepoType = "model") -> Path:
    """Where the cache shows the files of a commit under their names."""
    return repo_cache(ref.repo, repo_type) / "snapshots" / commit


def record_path(ref: Ref, commit: str, purpose: str, repo_type: RepoType = "model") -> Path:
    """Where it is noted what was found when the files of a commit were checked for a purpose."""
    return repo_cache(ref.repo, repo_type) / ".adapterhub" / f"{commit}-{purpose}.json"


def fetch(
    api: HfApi,
    ref: Ref,
    commit: str,
    purpose: str,
    choose: Callable[[Mapping[str, HubFile]], Sequence[str]],
    repo_type: RepoType = "model",
) -> Snapshot:
    """Bring the files that ``choose`` picks out of a commit's listing into the cache, and check them.

    What is downloaded is hashed once and compared with the Hub's digests. The result is kept beside the
    cached files, for each ``purpose``, with each file's size and time of change: as long as those stay, a
    later call trusts it and asks the Hub nothing; when they differ, the file is hashed again. Raises
    HubError for a file that is not what the Hub lists, or no longer what it was, and what ``choose`` and
    ``download`` raise.
    """
    record, folder = record_path(ref, commit, purpose, repo_type), snapshot_folder(ref, commit, repo_type)
    digests, touched = read_record(record, folder)
    if digests and all((folder / name).is_file() for name in touched):
        for name in touched:
            if sha256_file(folder / name) != digests[name]:
                raise _damaged(folder / name)
    else:
        listed = list_files(api, ref, commit, repo_type)
        chosen, touched = choose(listed), list(listed)
        fetched = download(api, ref, commit, chosen, repo_type, listed)
        digests = {name: fetched.get(name) or _check(folder / name, listed[name]) for name in chosen}
    if touched:
        write_record(record, folder, digests)
    return Snapshot(folder, commit, digests)


def _check(path: Path, listed: HubFile) -> str:
    """The sha256 of a file that was in the cache, found to be what the Hub lists."""
    if not path.is_file() or not listed.is_content_of(path):
        raise _damaged(path)
    return listed.sha256 or sha256_file(path)


def _damaged(path: Path) -> HubError:
    return HubError(
        f"{path} is not the file that the Hub lists: damaged on its way, or changed since",
        f"remove {path.resolve()} and run the same command again",
    )


def drop_damaged(folder: Path) -> list[str]:
    """Remove from the cache the files of a commit's folder whose content is not what their blob is named by.

    Returns their names. A file that is what its blob's name says came like that from the Hub, and stays.
    """
    damaged = []
    for name in list_names(folder):
        blob = (folder / name).resolve()
        if blob.parent.name != "blobs" or not blob.is_file():  # without links the cache names no content
            continue
        found = {_SHA256_CHARS: sha256_file, _SHA1_CHARS: _git_blob}.get(len(blob.name))
        if found is not None and found(blob) != blob.name:
            blob.unlink()
            (folder / name).unlink()
            damaged.append(name)
    return damaged


def _git_blob(path: Path) -> str:
    """The name that git gives to a file's content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
