"""Training and evaluation rows from a dataset repository on a Hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from adapterhub.errors import DataError, RefError, SignatureError
from adapterhub.hub.client import connect, list_tags, repo_cache, resolve
from adapterhub.hub.pull import newest
from adapterhub.hub.refs import LATEST, Ref, newest_of_line, parse_ref
from adapterhub.hub.snapshots import HubFile, Snapshot, fetch
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.splits import DATA_SUFFIXES, Split, belongs, is_data, split_named

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class FetchedRows:
    """The files of one split, in the Hugging Face cache."""

    folder: Path
    """Holds these files (as links) and nothing else."""
    name: str
    """``owner/name``."""
    revision: str
    """The commit, 40 hex digits."""


def fetch_rows(
    source: str, split: Split, *, endpoint: str | None = None, token: str | None = None
) -> FetchedRows:
    """Bring the .jsonl, .json or .parquet files of a dataset's split into the cache, checked as bases are.

    ``source`` is ``owner/name[@revision]``, without a revision what ``pull`` would take. A file belongs to
    the split that its path names, like ``data/train-00000-of-00001.parquet`` or ``test/rows.jsonl``; when no
    path names one, all files are the split's. Of versions, ``@v1`` means the highest 1.x.y, if no tag or
    branch is called so. The files of a dataset release must be those that its manifest lists, and a version's
    tag must hold that version.

    Raises DataError when the split is not there, or there more than once (several configurations, or
    the same rows in two formats), SignatureError for a release that is not what its manifest says, RefError
    for an unknown dataset, AuthError, HubError.
    """
    ref, api = parse_ref(source), connect(endpoint, token)
    ref, commit = _resolve(api, ref)
    snapshot = fetch(api, ref, commit, split, lambda listed: _choose(listed, str(ref), split), "dataset")
    if MANIFEST_NAME in snapshot.digests:
        _check_release(ref, snapshot)
    views = repo_cache(ref.repo, "dataset") / ".adapterhub"
    return FetchedRows(_link(snapshot, views / f"{commit}-{split}"), ref.repo, commit)


def _resolve(api: HfApi, ref: Ref) -> tuple[Ref, str]:
    """What ``ref`` names, and its commit; a line of versions (``v1``) is its highest."""
    if ref.revision in (None, LATEST):
        ref = newest(api, ref, "dataset")
    try:
        return ref, resolve(api, ref, "dataset").commit
    except RefError:
        tag = newest_of_line(ref.revision or "", list_tags(api, ref, "dataset"))
        if tag is None:
            raise
        chosen = Ref(ref.repo, tag)
        return chosen, resolve(api, chosen, "dataset").commit


def _check_release(ref: Ref, snapshot: Snapshot) -> None:
    """Raise SignatureError unless the fetched files are those of a dataset release's manifest."""
    manifest = Manifest.read(snapshot.folder)
    if ref.version is not None and manifest.version != ref.version:
        raise SignatureError(
            f"{ref} holds version {manifest.version}: the tag was moved",
            "ask its maker, or name the commit that you trust",
        )
    for name, digest in snapshot.digests.items():
        entry = manifest.files.get(name)
        if name != MANIFEST_NAME and (entry is None or entry.sha256 != digest):
            raise SignatureError(
                f"{ref} holds another {name} than its {MANIFEST_NAME} lists", "tell its maker"
            )


def _choose(listed: Mapping[str, HubFile], dataset: str, split: Split) -> Sequence[str]:
    """The data files of one split, and the manifest of a dataset release."""
    data = [name for name in sorted(listed) if is_data(PurePosixPath(name))]
    if not data:
        raise DataError(
            f"{dataset} holds no data files", f"name a dataset with {', '.join(DATA_SUFFIXES)} files"
        )
    splits = {name: split_named(name) for name in data}
    found = [name for name in data if belongs(name, split)]
    if not any(splits.values()):
        found = data
    if not found:
        there = sorted({known for known in splits.values() if known})
        raise DataError(
            f"{dataset} holds no files of the {split} split, only of {', '.join(there)}",
            f"name a dataset whose file names say {split}",
        )
    kinds = sorted({(PurePosixPath(name).parent, PurePosixPath(name).suffix) for name in found})
    if len(kinds) > 1:
        ways = " and ".join(f"{folder / '*'}{suffix}" for folder, suffix in kinds[:3])
        raise DataError(
            f"{dataset} holds the {split} split in {len(kinds)} ways: {ways}",
            "download the files you mean (hf download --repo-type dataset --local-dir) and name that folder",
        )
    return [*found, MANIFEST_NAME] if MANIFEST_NAME in listed else found


def _link(snapshot: Snapshot, view: Path) -> Path:
    """A folder that shows these files and no others: the commit's own may hold those of another split."""
    rows = [name for name in snapshot.digests if name != MANIFEST_NAME]
    wanted = {PurePosixPath(name).name: snapshot.folder / name for name in rows}
    if view.is_dir() and {path.name for path in view.iterdir() if path.is_file()} == wanted.keys():
        return view
    view.parent.mkdir(exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{view.name}.", dir=view.parent))
    try:
        for name, target in wanted.items():
            (staging / name).symlink_to(os.path.relpath(target, staging))
        if view.exists():
            shutil.rmtree(view)
        staging.replace(view)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return view
