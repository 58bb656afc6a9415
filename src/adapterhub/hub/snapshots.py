"""Some files of one commit in the Hugging Face cache, checked against the digests that the Hub lists."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import HubError
from adapterhub.hub.client import RepoType, hub_errors, repo_cache
from adapterhub.hub.refs import Ref
from adapterhub.packaging.files import check_relative_path, sha256_file, write_atomic

if TYPE_CHECKING:
    from huggingface_hub import HfApi


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


def download(api: HfApi, ref: Ref, commit: str, names: Iterable[str], repo_type: RepoType = "model") -> Path:
    """Bring ``names`` of a commit into the cache, those that are not there yet; return the commit's folder.

    Asks the Hub nothing when all are there. A name that the commit has not is left out. Raises OSError for a
    full disk (nothing half-written is kept), RefError, AuthError, HubError.
    """
    wanted = list(names)
    folder = repo_cache(ref.repo, repo_type) / "snapshots" / commit
    if all((folder / name).is_file() for name in wanted):
        return folder
    with hub_errors(api, ref):
        api.snapshot_download(
            ref.repo,
            repo_type=repo_type,
            revision=commit,
            allow_patterns=[glob.escape(name) for name in wanted],
        )
    return folder


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
    record = repo_cache(ref.repo, repo_type) / ".adapterhub" / f"{commit}-{purpose}.json"
    folder = repo_cache(ref.repo, repo_type) / "snapshots" / commit
    known = _read_record(record)
    if known and all((folder / name).is_file() for name in known):
        digests = {name: _recheck(folder / name, entry) for name, entry in known.items()}
    else:
        listed = list_files(api, ref, commit, repo_type)
        chosen = choose(listed)
        download(api, ref, commit, chosen, repo_type)
        digests = {name: _check(folder / name, listed[name]) for name in chosen}
    entries = {name: _entry(folder / name, digest) for name, digest in digests.items()}
    if entries != known:
        _write_record(record, entries)
    return Snapshot(folder, commit, digests)


def _check(path: Path, listed: HubFile) -> str:
    """The sha256 of a file that was downloaded, found to be what the Hub lists."""
    if not path.is_file() or not listed.is_content_of(path):
        raise _damaged(path)
    return listed.sha256 or sha256_file(path)


def _recheck(path: Path, entry: Mapping[str, object]) -> str:
    """The sha256 of a file that was checked before; it is hashed again only if it was touched since."""
    digest = str(entry["sha256"])
    if _entry(path, digest) != entry and sha256_file(path) != digest:
        raise _damaged(path)
    return digest


def _damaged(path: Path) -> HubError:
    return HubError(
        f"{path} is not the file that the Hub lists: damaged on its way, or changed since",
        f"remove {path.resolve()} and run the same command again",
    )


def _entry(path: Path, digest: str) -> dict[str, object]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}


def _read_record(path: Path) -> dict[str, dict[str, object]]:
    """What an earlier call found; empty when there is nothing, or nothing sound, so that all is checked
    anew."""
    try:
        content = json.loads(path.read_bytes())
        return {
            check_relative_path(name): {**entry, "sha256": entry["sha256"]} for name, entry in content.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}


def _write_record(path: Path, entries: Mapping[str, Mapping[str, object]]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(entries, indent=1).encode())
    except OSError as err:  # a cache that others own works too, only slower
        if err.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def _git_blob(path: Path) -> str:
    """The name that git gives to a file's content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
