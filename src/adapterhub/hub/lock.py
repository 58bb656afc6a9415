"""What a project runs on: releases locked, pulled as they were locked, and never an older one unasked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from adapterhub.errors import (
    AdapterHubWarning,
    BaseMismatchError,
    LockError,
    RefError,
    SignatureError,
    VersionError,
)
from adapterhub.hub.client import Unreachable, connect, resolve
from adapterhub.hub.lockfile import LOCK_NAME, LockedBase, LockedRelease, LockFile
from adapterhub.hub.pull import Part, Pulled, pull
from adapterhub.hub.refs import Ref, parse_ref
from adapterhub.hub.snapshots import snapshot_folder
from adapterhub.hub.tally import Progress
from adapterhub.packaging.anchors import Signer
from adapterhub.packaging.manifest import MANIFEST_NAME, BaseLock, parse_version


def lock_release(
    ref: str,
    lock: LockFile,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    keys: Sequence[Path] = (),
    require_signed: bool = False,
    allow_downgrade: bool = False,
) -> tuple[str, LockedRelease]:
    """Pull what ``ref`` names now; return its key and entry, to stand in ``lock`` in place of the old.

    Raises VersionError for an older version than ``lock`` knows (unless ``allow_downgrade``), SignatureError
    when a version was moved since it was locked, or a signer of then did not sign this one, and what a pull
    raises.
    """
    asked = parse_ref(ref)
    old = lock.releases.get(str(asked))
    pulled = pull(asked, endpoint=endpoint, token=token, keys=keys, require_signed=require_signed)
    new = _describe(pulled)
    if not allow_downgrade:
        _check_not_older(lock, asked, new.version)
    if old is not None and old.tag == new.tag and old.version == new.version and old.tag is not None:
        _check_same(str(asked), old, pulled, new)
    elif old is not None:
        _check_signers(str(asked), old, new)
    return str(asked), new


def pull_locked(
    ref: str,
    path: Path,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    out: Path | None = None,
    keys: Sequence[Path] = (),
    require_signed: bool = False,
    only: Part | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Pull exactly what the lock file at ``path`` holds for ``ref``: that commit, that manifest.

    The Hub is asked one thing, whether the version's tag still names that commit; when it cannot be reached,
    what is in the cache will do, and an AdapterHubWarning says so. Raises LockError when ``ref`` is not
    locked, SignatureError when the tag, the manifest or the signer is another than locked, BaseMismatchError
    when the base is, and what a pull raises.
    """
    asked = parse_ref(ref)
    entry = LockFile.read(path).find(asked)
    if entry is None:
        raise LockError(f"{path} does not lock {asked}", f"add it: `adapterhub lock {asked}`")
    offline = _check_tag(asked.repo, entry, endpoint, token)
    at_commit = Ref(asked.repo, entry.commit)
    take = partial(
        pull,
        endpoint=endpoint,
        token=token,
        keys=keys,
        require_signed=require_signed,
        only=only,
        progress=progress,
    )
    pulled = take(at_commit)
    _check_same(str(asked), entry, pulled, _describe(pulled))
    if out is not None:  # what was refused above is not copied there
        pulled = take(at_commit, out=out)
        _check_same(str(asked), entry, pulled, _describe(pulled))
    return replace(pulled, tag=entry.tag, offline=offline)


def pull_not_older(
    ref: str,
    path: Path,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    out: Path | None = None,
    keys: Sequence[Path] = (),
    require_signed: bool = False,
    allow_downgrade: bool = False,
    only: Part | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Pull what ``ref`` names now, held against the lock file at ``path`` where there is one.

    Raises VersionError when it is an older version than the lock knows, unless ``allow_downgrade``; nothing
    is copied to ``out`` then.
    """
    take = partial(
        pull,
        endpoint=endpoint,
        token=token,
        keys=keys,
        require_signed=require_signed,
        only=only,
        progress=progress,
    )
    if allow_downgrade or not path.is_file():
        return take(ref, out=out)
    lock, asked = LockFile.read(path), parse_ref(ref)
    pulled = take(asked)
    _check_not_older(lock, asked, pulled.release.manifest.version)
    if out is None:
        return pulled
    copied = take(Ref(pulled.repo, pulled.commit), out=out)
    return replace(copied, tag=pulled.tag, offline=pulled.offline)


def _describe(pulled: Pulled) -> LockedRelease:
    manifest = pulled.release.manifest
    return LockedRelease(
        version=manifest.version,
        tag=pulled.tag,
        commit=pulled.commit,
        manifest_sha256=pulled.release.digest,
        signers=tuple(dict.fromkeys(identify(signer) for signer in pulled.signers)),
        base=_describe_base(manifest.base),
    )


def _describe_base(base: BaseLock | None) -> LockedBase | None:
    if base is None:
        return None
    return LockedBase(name=base.name, revision=base.revision, digest=base.digest)


def identify(signer: Signer) -> str:
    """A signer as a lock file names one: ``key:FINGERPRINT``, or ``certificate:NAME``, ``sigstore:NAME``.

    A certificate is made anew from time to time, and Sigstore's for each signature; the name in it stays.
    """
    return f"{signer.kind}:{signer.name or signer.fingerprint}"


def _check_tag(repo: str, entry: LockedRelease, endpoint: str | None, token: str | None) -> bool:
    """Raise SignatureError when the version's tag names another commit than it did.

    Returns whether the Hub could not be asked, which an AdapterHubWarning says. Raises HubError when it could
    not, and nothing of the release is in the cache either.
    """
    if entry.tag is None:
        return False
    from huggingface_hub.errors import RevisionNotFoundError

    tagged = Ref(repo, entry.tag)
    try:
        found = resolve(connect(endpoint, token), tagged)
    except Unreachable as err:
        if not (snapshot_folder(tagged, entry.commit) / MANIFEST_NAME).is_file():
            raise
        words = f"{err.what}; whether {tagged} was moved is not known, the cache is held to the lock"
        warnings.warn(AdapterHubWarning(words), stacklevel=3)
        return True
    except RefError as err:
        if not isinstance(err.__cause__, RevisionNotFoundError):
            raise
        raise SignatureError(
            f"{tagged} is locked at commit {entry.commit[:12]}, and is gone: {err.what}",
            "a version never goes away: ask its maker, and lock another version if this was meant",
        ) from err
    if found.commit != entry.commit:
        raise _moved(tagged, entry.commit, found.commit)
    return found.offline


def _moved(tagged: Ref, locked: str, found: str) -> SignatureError:
    return SignatureError(
        f"{tagged} was moved: it is locked at commit {locked[:12]} and names {found[:12]} now",
        "a version never changes: ask its maker, and lock another version if this was meant",
    )


def _check_same(ref: str, locked: LockedRelease, pulled: Pulled, found: LockedRelease) -> None:
    """Raise unless what was pulled is what is locked."""
    if found.commit != locked.commit:
        raise _moved(Ref(pulled.repo, locked.tag), locked.commit, found.commit)
    if (found.manifest_sha256, found.version) != (locked.manifest_sha256, locked.version):
        raise SignatureError(
            f"{ref} at commit {found.commit[:12]} has the manifest digest {found.manifest_sha256[:12]}… "
            f"(version {found.version}), locked is {locked.manifest_sha256[:12]}… ({locked.version})",
            f"one of the two was changed: take {LOCK_NAME} from your version control again",
        )
    if found.base != locked.base:
        ours, theirs = (f"{it.name} {it.digest[:12]}…" if it else "none" for it in (locked.base, found.base))
        raise BaseMismatchError(
            f"{ref} names the base {theirs}, locked is {ours}",
            f"one of the two was changed: take {LOCK_NAME} from your version control again",
        )
    _check_signers(ref, locked, found)


def _check_signers(ref: str, locked: LockedRelease, found: LockedRelease) -> None:
    """Raise SignatureError unless all who signed what was locked are known to have signed this too."""
    missing = [signer for signer in locked.signers if signer not in found.signers]
    if missing:
        others = f"signed by {', '.join(found.signers)}" if found.signers else "signed by nobody trusted here"
        raise SignatureError(
            f"{ref} {found.version} is {others}; it is locked as signed by {missing[0]}",
            "trust that signer here, or name their key with --key; if another signer is meant, "
            f"remove its entry from {LOCK_NAME} and lock it again",
        )


def _check_not_older(lock: LockFile, ref: Ref, version: str) -> None:
    """Raise VersionError for a version below the one that ``lock`` knows."""
    known = lock.known_version(ref)
    if known is not None and parse_version(version) < parse_version(known):
        raise VersionError(
            f"{ref} is version {version} here, and {LOCK_NAME} knows {known}: it would go back",
            "if you mean to go back, say --allow-downgrade; else ask what became of the newer one",
        )
