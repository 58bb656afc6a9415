"""Rows to a Hub: a dataset release made of them, and pushed, unless the Hub holds these very rows already."""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import (
    ConflictError,
    DataError,
    ManifestError,
    RefError,
    SignatureError,
    VersionError,
)
from adapterhub.hub.client import connect, list_tags, look_up, repo_cache, resolve
from adapterhub.hub.proposals import find_proposals
from adapterhub.hub.push import Delivery, Pushed, push
from adapterhub.hub.refs import Ref, highest_version, parse_ref, tag_of
from adapterhub.hub.snapshots import download, snapshot_folder
from adapterhub.hub.tally import Progress
from adapterhub.packaging.anchors import TrustedKey
from adapterhub.packaging.bundles import SIGNATURE_NAME
from adapterhub.packaging.dataset.evidence import DATASET, DatasetEvidence, read_dataset_evidence
from adapterhub.packaging.dataset.lengths import TokenCounter
from adapterhub.packaging.files import sha256_file
from adapterhub.packaging.keys import public_pem, read_private_key
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest, parse_version
from adapterhub.packaging.release import Release
from adapterhub.packaging.signing import sign_release
from adapterhub.packaging.verification import verify_signature
from adapterhub.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TOKENIZER = "tokenizer.json"
_FIRST_VERSION = "1.0.0"
_TOOLS = ("datasets", "pyarrow")
Render = Callable[[Manifest, DatasetEvidence, str], bytes]


@dataclass(frozen=True)
class Wish:
    """What a dataset release is to be like."""

    version: str | None = None
    """None: 1.0.0, or the next minor version above the highest on the Hub."""
    licence: str | None = None
    task: str | None = None
    """One sentence: what is in it."""
    test: Path | None = None
    """A file or folder of test rows."""
    test_share: float = 0.0
    """Share of the rows that become test rows."""
    tokenizer: str | None = None
    """A folder with tokenizer.json, or ``owner/name``."""
    benchmarks: Mapping[str, Path] = field(default_factory=dict)
    """Files to compare the train rows with, by name."""
    key: Path | None = None
    """A private key to sign it with."""
    password: str | None = None


@dataclass(frozen=True)
class Published:
    """A dataset release that was pushed, or was there."""

    pushed: Pushed
    manifest: Manifest
    evidence: DatasetEvidence


def publish_rows(
    path: Path,
    repo: str,
    wish: Wish,
    render: Render,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    delivery: Delivery | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Published:
    """Make a dataset release of the rows in ``path`` (a file, or a folder of them) and push it to ``repo``.

    ``render`` writes the card of a manifest and its evidence, for a repository. Rows that the Hub holds under
    the wished version, or under its highest when none is wished, are not sent again, however their files were
    cut. The release is made beside the Hub's cache and removed again. ``progress``: see ``push``.

    Raises DataError for malformed rows, by file and line; VersionError for a version that is taken by other
    rows; ConflictError when another process publishes to the same repository from here; what ``push`` raises.
    """
    from adapterhub.packaging.dataset.build import build_dataset
    from adapterhub.packaging.dataset.inputs import find_inputs

    ref = parse_ref(repo)
    if ref.revision is not None:
        raise RefError(
            f"{repo!r} names a revision", f"push to {ref.repo}, and name the version with --version"
        )
    inputs = find_inputs(path, wish.test, wish.test_share)
    api = connect(endpoint, token)
    is_there = look_up(api, ref, "dataset") is not None
    tags = list_tags(api, ref, "dataset") if is_there else {}
    version = _choose_version(wish.version, tags)
    delivery = delivery or Delivery()
    begun: _Begun | None = None

    def draft(evidence: DatasetEvidence) -> Manifest:
        nonlocal begun
        if is_there and tag_of(version) not in tags:
            begun = _find_begun(api, ref, delivery, version, evidence.digest)
        return _draft(
            ref, version, wish, begun.created if begun else datetime.now(UTC).replace(microsecond=0)
        )

    counter = _open_tokenizer(api, wish.tokenizer) if wish.tokenizer is not None else None
    with _workplace(ref) as folder:
        release = build_dataset(
            folder / "release",
            draft,
            inputs,
            source=path.resolve().name,
            benchmarks=wish.benchmarks,
            counter=counter,
            render=lambda manifest, evidence: render(manifest, evidence, ref.repo),
        )
        evidence = read_dataset_evidence(release.path)
        same = _find_same(api, ref, tags, wish.version, release, evidence)
        if same is not None:
            return Published(same, release.manifest, evidence)
        if wish.key is not None:
            _sign(api, ref, release, wish.key, wish.password, begun)
        pushed = push(
            release,
            repo,
            endpoint=endpoint,
            token=token,
            delivery=delivery,
            dry_run=dry_run,
            progress=progress,
        )
        return Published(pushed, release.manifest, evidence)


def _choose_version(wished: str | None, tags: Mapping[str, str]) -> str:
    if wished is not None:
        parse_version(wished)
        return wished.removeprefix("v")
    highest = highest_version(tags)
    if highest is None:
        return _FIRST_VERSION
    major, minor, _ = parse_version(highest).release
    return f"{major}.{minor + 1}.0"


@dataclass(frozen=True)
class _Begun:
    """What an earlier push of these rows left without a tag: with its time, and its signature, the same rows
    become the same release, which completes that push, or finds its pull request."""

    commit: str
    """40 hex digits."""
    created: datetime


def _find_begun(api: HfApi, ref: Ref, delivery: Delivery, version: str, digest: str) -> _Begun | None:
    """What was begun of ``version``: at the head of the branch, or in an open pull request if this is to be
    one."""
    commits = []
    with suppress(RefError):  # a branch to be made
        commits.append(resolve(api, Ref(ref.repo, delivery.branch), "dataset").commit)
    if delivery.as_pull_request:
        commits += [proposal.commit for proposal in find_proposals(api, ref, "dataset")]
    for commit in commits:
        download(api, ref, commit, [MANIFEST_NAME, DATASET], "dataset")
        folder = snapshot_folder(ref, commit, "dataset")
        with suppress(ManifestError):  # something else is there
            manifest, evidence = Manifest.read(folder), read_dataset_evidence(folder)
            if (manifest.version, evidence.digest) == (version, digest):
                return _Begun(commit, manifest.created)
    return None


def _sign(
    api: HfApi, ref: Ref, release: Release, key: Path, password: str | None, begun: _Begun | None
) -> None:
    """Sign the release, or give it the signature that ``key`` made of it before: a new one would differ."""
    if begun is not None:
        before = snapshot_folder(ref, begun.commit, "dataset") / SIGNATURE_NAME
        download(api, ref, begun.commit, [SIGNATURE_NAME], "dataset")
        if before.is_file():
            shutil.copyfile(before, release.path / SIGNATURE_NAME)
            public = read_private_key(key, password).public_key()
            with suppress(SignatureError):  # another's, or of a release made with other options
                verify_signature(release.path, anchors=[TrustedKey(public_pem(public), key)])
                return
    sign_release(release.path, key, password)


def _draft(ref: Ref, version: str, wish: Wish, created: datetime) -> Manifest:
    name = re.sub(r"^[^A-Za-z0-9]+", "", ref.repo.partition("/")[2]) or "dataset"
    return Manifest(
        name=name,
        version=version,
        created=created,
        kind="dataset",
        task=wish.task,
        licence=wish.licence,
        tools={"adapterhub": __version__} | {tool: installed_version(tool) for tool in _TOOLS},
    )


def _find_same(
    api: HfApi,
    ref: Ref,
    tags: Mapping[str, str],
    wished: str | None,
    release: Release,
    evidence: DatasetEvidence,
) -> Pushed | None:
    """The version on the Hub that holds these rows under the same licence already.

    Raises VersionError when the wished version is there with other rows.
    """
    tag = tag_of(release.manifest.version) if wished is not None else highest_version(tags)
    if tag is None or tag not in tags:
        return None
    commit = resolve(api, Ref(ref.repo, tag), "dataset").commit
    download(api, ref, commit, [MANIFEST_NAME, DATASET], "dataset")
    folder = snapshot_folder(ref, commit, "dataset")
    try:
        manifest, known = Manifest.read(folder), read_dataset_evidence(folder)
        is_same = (known.digest, manifest.licence) == (evidence.digest, release.manifest.licence)
    except ManifestError:  # made by something else
        is_same = False
    if is_same:
        url = f"{api.endpoint}/datasets/{ref.repo}/commit/{commit}"
        return Pushed(ref.repo, tag, "already there", commit, url, (), (), None)
    if wished is None:
        return None
    raise VersionError(
        f"{ref}@{tag} is there with other rows or another licence, and a version never changes",
        f"give it a version above {(highest_version(tags) or tag).removeprefix('v')}",
    )


@contextmanager
def _workplace(ref: Ref) -> Iterator[Path]:
    """An empty folder on the cache's disk, for one process at a time; it is removed at the end.

    What a killed process left there goes first. Raises ConflictError when another process is at it.
    """
    folder = repo_cache(ref.repo, "dataset") / ".adapterhub"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "push.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"another process here is publishing to {ref}", "wait for it, then run it again"
            ) from None
        shutil.rmtree(folder / "push", ignore_errors=True)
        (folder / "push").mkdir()
        try:
            yield folder / "push"
        finally:
            shutil.rmtree(folder / "push", ignore_errors=True)


def _open_tokenizer(api: HfApi, name: str) -> TokenCounter:
    """The tokenizer in a folder, or in a model repository. Raises DataError when there is none."""
    from tokenizers import Tokenizer

    folder = Path(name)
    if not folder.is_dir():
        ref = parse_ref(name)
        commit = resolve(api, ref).commit
        download(api, ref, commit, [_TOKENIZER])
        folder, name = snapshot_folder(ref, commit), f"{ref.repo}@{commit[:12]}"
    path = folder / _TOKENIZER
    if not path.is_file():
        raise DataError(f"{name} holds no {_TOKENIZER}", "name a model with a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:  # tokenizers raises nothing more special
        raise DataError(f"{path} cannot be read: {err}", "name another tokenizer") from err
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: list[str]) -> list[int]:
        return [len(it) for it in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return TokenCounter(Path(name).name if Path(name).is_dir() else name, sha256_file(path), count)
