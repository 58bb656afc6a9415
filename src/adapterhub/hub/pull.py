"""A release from a Hub: resolved to a commit once, downloaded, checked, and only then handed over."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapterhub.errors import HubError, ManifestError, RefError, ReleaseError, SignatureError
from adapterhub.hub.client import (
    RepoType,
    Resolved,
    Unreachable,
    connect,
    list_tags,
    offline,
    repo_cache,
    resolve,
)
from adapterhub.hub.downloads import check_space
from adapterhub.hub.records import read_record, write_record
from adapterhub.hub.refs import LATEST, Ref, highest_version, parse_ref, tag_of
from adapterhub.hub.snapshots import (
    HubFile,
    download,
    drop_damaged,
    list_files,
    record_path,
    snapshot_folder,
)
from adapterhub.hub.tally import Progress
from adapterhub.packaging.anchors import Signer
from adapterhub.packaging.behaviour import part_of
from adapterhub.packaging.bundles import is_signature, signature_files
from adapterhub.packaging.files import sha256_file, staged_folder
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.release import Release
from adapterhub.packaging.temporary import remove_leftovers
from adapterhub.packaging.verification import Checked, check_release

if TYPE_CHECKING:
    from huggingface_hub import HfApi


Part = Literal["adapter", "facts"]
"""Of a release: what loading an adapter needs, or what tells of it without its weights."""
_LOADED = ("weights", "template", "tokens")
_FACTS = (
    "evidence/scores.json",
    "evidence/dataset.json",
    "adapter_config.json",
    "tokenizer_config.json",
)


def _is_head(name: str) -> bool:
    """Whether nothing in the release vouches for a file: the manifest and the signatures."""
    return name == MANIFEST_NAME or is_signature(name)


@dataclass(frozen=True)
class Pulled:
    """A release from a Hub, every file of it checked."""

    release: Release
    repo: str
    """``owner/name``."""
    commit: str
    """The commit that every file was taken at, 40 hex digits."""
    tag: str | None
    """The version tag it was taken from, like ``v1.2.0``; None for a branch, a commit, or another tag."""
    signers: tuple[Signer, ...]
    """Who signed it, as far as they are trusted here; its maker first."""
    offline: bool
    """Whether the Hub could not be asked what the reference names, and the cache answered."""
    files: tuple[str, ...]
    """Those of its files that are here, checked: all, unless a part was asked for."""

    @property
    def signer(self) -> Signer | None:
        """The first of ``signers``; None when it is unsigned, or signed by nobody who is trusted here."""
        return self.signers[0] if self.signers else None


def pull(
    ref: str | Ref,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    out: Path | None = None,
    keys: Sequence[Path] = (),
    require_signed: bool = False,
    repo_type: RepoType = "model",
    only: Part | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Bring a release into the Hugging Face cache, check every file of it, and open it.

    Adapters and models come from model repositories, releases of kind dataset from those of ``repo_type``
    ``dataset``.

    ``ref`` without a revision means the highest version there is, a pre-release only if there is nothing
    else, and the main branch of a repository without versions; ``@latest`` is the same, and an error without
    versions. Only what the manifest lists is downloaded. A
    file that is in the cache is not downloaded again, nor read again as long as its size and times of change
    are those of the last check; one that was damaged there is fetched anew, and a manifest or a signature
    that was written there, and is not the Hub's, is refused. A large file whose download was
    cut off goes on where it was. ``out`` gets a copy, whole or not at all; a folder that holds this release
    already is left as it is. A signature must hold if it is by one of ``keys`` (public key files) or of the
    trusted keys; ``require_signed`` refuses a release without such a signature. When the Hub
    cannot be reached, what is in the cache will do if ``ref`` names a commit, or a version seen before; with
    HF_HUB_OFFLINE set, a branch seen before too. That is warned of (AdapterHubWarning).

    ``only="adapter"`` takes what loading it needs, no card and no evidence; ``"facts"`` takes neither weights
    nor tokens. Manifest and signatures are checked as ever, and every file that is taken; ``out`` then gets
    these files, and is a part of a release.
    ``progress`` is told the bytes of each download, that are there and in all.

    Raises SignatureError when a file is not what the manifest lists, when a signature does not hold or is
    missing though required, and when a version tag holds another version; ManifestError when it is no
    release; ReleaseError when ``out`` holds something else, or what should be an adapter is none; RefError,
    AuthError, HubError; AdapterHubError when the disk has too little space, OSError when it is full.
    """
    asked = parse_ref(ref) if isinstance(ref, str) else ref
    api = connect(endpoint, token)
    chosen = newest(api, asked, repo_type)
    resolved = resolve(api, chosen, repo_type)
    commit = resolved.commit
    take = partial(
        _take_checked,
        api,
        chosen,
        commit,
        keys,
        require_signed,
        repo_type,
        only=only,
        out=out,
        progress=progress,
    )
    with _cache_alone(api, chosen, resolved, repo_type) if resolved.offline else nullcontext():
        try:
            checked = take()
        except (SignatureError, ManifestError):
            if not drop_damaged(snapshot_folder(chosen, commit, repo_type)):
                raise
            checked = take()
    tag = tag_of(chosen.version) if chosen.version is not None else None
    release = checked.release
    files = _files_of(chosen, release.manifest, only)
    if out is not None:
        release = Release(_copy(release, out, files), release.manifest)
    return Pulled(release, chosen.repo, commit, tag, checked.signers, resolved.offline, files)


@contextmanager
def _cache_alone(api: HfApi, ref: Ref, resolved: Resolved, repo_type: RepoType) -> Iterator[None]:
    """Inside, a Hub that has just not answered is not asked again. Raises HubError, saying so, when the cache
    has not all that is wanted."""
    folder = snapshot_folder(ref, resolved.commit, repo_type)
    try:
        with offline():
            yield
    except Unreachable as err:
        lacks = "holds no more than a part"
        with suppress(ManifestError):
            missing = [name for name in Manifest.read(folder).files if not (folder / name).is_file()]
            if missing:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                lacks = f"lacks {', '.join(missing[:3])}{more}"
        raise HubError(
            f"the cache {lacks} of {ref}, and {api.endpoint} cannot be asked",
            "pull it once while that Hub answers, without --offline or HF_HUB_OFFLINE",
        ) from err


def newest(api: HfApi, ref: Ref, repo_type: RepoType = "model") -> Ref:
    """``ref``, or what it means without a revision: the highest version, or else the main branch.

    ``latest`` means the highest version too, and RefError when there is none. In offline mode it is the
    highest that the cache has seen, and the main branch if it has seen none.
    """
    from huggingface_hub import is_offline_mode

    if ref.revision not in (None, LATEST):
        return ref
    try:
        highest = highest_version(list(list_tags(api, ref, repo_type)))
    except Unreachable as err:
        seen = [path.name for path in (repo_cache(ref.repo, repo_type) / "refs").glob("v*")]
        known = highest_version(seen)
        if is_offline_mode() and (known is not None or ref.revision is None):
            return Ref(ref.repo, known)  # without versions the main branch, if that was seen
        if known is None:
            raise
        raise HubError(
            err.what, f"{err.fix}; or name a version that was pulled before: {ref.repo}@{known}"
        ) from err
    if highest is None and ref.revision == LATEST:
        raise RefError(f"{ref.repo} has no version yet", f"name a branch or a commit: {ref.repo}@main")
    return Ref(ref.repo, highest)


def _files_of(ref: Ref, manifest: Manifest, only: Part | None) -> tuple[str, ...]:
    """The files to take, by name. Raises ReleaseError when the adapter is wanted of what is none."""
    if only is None:
        return tuple(sorted(manifest.files))
    if only == "facts":
        return tuple(name for name in _FACTS if name in manifest.files)
    if manifest.kind != "adapter":
        raise ReleaseError(f"{ref} is of kind {manifest.kind}, not an adapter", "leave out --only adapter")
    return tuple(sorted(name for name in manifest.files if part_of(name)[0] in _LOADED))


def _take_checked(
    api: HfApi,
    ref: Ref,
    commit: str,
    keys: Sequence[Path],
    require_signed: bool,
    repo_type: RepoType,
    *,
    only: Part | None,
    out: Path | None,
    progress: Progress | None,
) -> Checked:
    """Bring a release into the cache and check it; what was checked before and is untouched is not read."""
    folder = snapshot_folder(ref, commit, repo_type)
    record = record_path(ref, commit, f"pull-{only}" if only else "pull", repo_type)
    digests, touched = read_record(record, folder)
    known_heads = {name: digest for name, digest in digests.items() if _is_head(name)}
    heads, listed = _take_heads(api, ref, commit, repo_type, known_heads, progress)
    manifest = _read_manifest(ref, folder)
    files = _files_of(ref, manifest, only)
    if out is not None:
        _check_room(out, manifest, files)
    fetched = download(api, ref, commit, files, repo_type, listed, progress)
    known = {name: digest for name, digest in digests.items() if name not in touched} | fetched
    try:
        checked = check_release(
            folder,
            keys,
            publisher=ref.repo,
            require_signed=require_signed,
            known=known,
            only=None if only is None else files,
        )
    except SignatureError:
        _say_whose(api, ref, commit, files, listed, repo_type)
        raise
    if touched or not digests:
        write_record(record, folder, heads | {name: manifest.files[name].sha256 for name in files})
    return checked


def _take_heads(
    api: HfApi,
    ref: Ref,
    commit: str,
    repo_type: RepoType,
    known: dict[str, str],
    progress: Progress | None,
) -> tuple[dict[str, str], dict[str, HubFile] | None]:
    """Bring the manifest and the signature, which nothing else vouches for, as the commit lists them.

    Returns the sha256 of each that it has, and the commit's listing; ``known`` is the former from an earlier
    check, and the Hub is then asked for no listing. Raises SignatureError when the cache shows another, or
    one that the commit has not.
    """
    folder = snapshot_folder(ref, commit, repo_type)
    listed = None
    if known:
        wanted = known
        download(api, ref, commit, wanted, repo_type, progress=progress)
        same = {name: sha256_file(folder / name) == digest for name, digest in wanted.items()}
    else:
        listed = list_files(api, ref, commit, repo_type)
        if MANIFEST_NAME not in listed:
            raise _no_release(ref)
        heads = [name for name in listed if _is_head(name)]
        download(api, ref, commit, heads, repo_type, listed, progress)
        same = {name: listed[name].is_content_of(folder / name) for name in heads}
        wanted = {name: sha256_file(folder / name) for name in same}
    for name in (MANIFEST_NAME, *signature_files(folder)):
        if (folder / name).is_file() and not same.get(name, False):
            raise SignatureError(
                f"{folder / name} is not what the Hub holds at {commit[:12]}: it was written here since",
                f"copy what you need of that folder, remove it ({folder}), and pull again",
            )
    return wanted, listed


def _no_release(ref: Ref) -> ManifestError:
    return ManifestError(
        f"{ref} holds no {MANIFEST_NAME}, so it is not a release",
        "load it with peft or transformers, or name a repository that `adapterhub push` made",
    )


def _read_manifest(ref: Ref, folder: Path) -> Manifest:
    """The manifest of what was asked for."""
    manifest = Manifest.read(folder)
    if ref.version is not None and manifest.version != ref.version:
        raise SignatureError(
            f"{ref} holds version {manifest.version}: the tag was moved",
            "ask its maker, or name the commit that you trust",
        )
    return manifest


def _say_whose(
    api: HfApi,
    ref: Ref,
    commit: str,
    files: Sequence[str],
    listed: Mapping[str, HubFile] | None,
    repo_type: RepoType,
) -> None:
    """Raise SignatureError for a file that is not what the manifest lists, saying where it became so: on the
    Hub, or here. Says nothing when a signature is what differs, or when the Hub cannot be asked."""
    folder = snapshot_folder(ref, commit, repo_type)
    release = Release.open(folder)
    for name in files:
        try:
            release.check_files([name])
        except SignatureError as err:
            with suppress(HubError):
                there = (listed or list_files(api, ref, commit, repo_type)).get(name)
                path = folder / name
                if there is not None and path.is_file() and not there.is_content_of(path):
                    fix = "it was written here since, or damaged: remove it, and pull again"
                else:
                    fix = "the Hub holds it like that: tell its maker"
                raise SignatureError(err.what, fix) from err


def _check_room(out: Path, manifest: Manifest, files: Sequence[str]) -> None:
    """Raise AdapterHubError when the disk of ``out`` cannot take a copy of the files."""
    if not (out / MANIFEST_NAME).is_file():  # else it holds them already, or something else
        wanted = sum(manifest.files[name].size for name in files)
        check_space(out, wanted, "name a folder on another")


def _copy(release: Release, out: Path, files: Sequence[str]) -> Path:
    """Copy ``files`` of a release to ``out``, all or none; leave it as it is when they are there already,
    unchanged."""
    folder = release.path
    if _holds(out, folder):
        Release.open(out).check_files(files)
        remove_leftovers(out)
        return out
    _check_room(out, release.manifest, files)  # once more: the download may have been to the same disk
    names = [MANIFEST_NAME, *files, *signature_files(folder)]
    try:
        with staged_folder(out) as staging:
            for name in names:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, staging / name)
    except OSError as err:
        if err.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
        ):  # copyfile names the source, whose disk is not the full one
            raise OSError(err.errno, err.strerror, str(out)) from err
        raise
    return out


def _holds(out: Path, folder: Path) -> bool:
    """Whether ``out`` claims to be the very release in ``folder``: the same manifest, the same signatures."""
    return (out / MANIFEST_NAME).is_file() and all(
        _content(out / name) == _content(folder / name)
        for name in (MANIFEST_NAME, *signature_files(out), *signature_files(folder))
    )


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
