"""A release to a Hub: one atomic commit, then the tag of its version, which never moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from adapterhub.errors import (
    ConflictError,
    HubError,
    RefError,
    VersionError,
)
from adapterhub.hub.changes import (
    FileChange,
    Head,
    change_of,
    compare_files,
    names_of,
    repo_type_of,
)
from adapterhub.hub.client import RepoType, connect, hub_errors, look_up
from adapterhub.hub.held import HeldFile, hold_small_files
from adapterhub.hub.history import find_earlier, state_version
from adapterhub.hub.proposals import Proposal, find_proposals, is_against, who_moved
from adapterhub.hub.refs import Ref, highest_version, parse_ref, tag_of, version_of
from adapterhub.hub.snapshots import list_files
from adapterhub.hub.tally import Progress
from adapterhub.hub.uploads import commit_files
from adapterhub.packaging.anchors import Signer
from adapterhub.packaging.manifest import MANIFEST_NAME, parse_version
from adapterhub.packaging.release import Release
from adapterhub.packaging.verification import check_release

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Outcome = Literal["pushed", "proposed", "proposed before", "tagged", "already there", "dry run"]


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do."""

    repo: str
    tag: str
    """The version tag, like ``v1.2.0``."""
    outcome: Outcome
    """``tagged`` when an earlier push had made the commit, but not the tag; ``proposed`` as a pull request,
    ``proposed before`` when that is open already."""
    commit: str | None
    """The commit that the tag names, or will name, 40 hex digits; None for a dry run that would make one."""
    url: str
    """Where it can be looked at: the commit or the pull request; the repository, when there is neither."""
    files: tuple[FileChange, ...]
    """Every file of the release, and those deleted, by name."""
    kept: tuple[str, ...]
    """Files of the repository that no release lists: they stay as they are."""
    signer: Signer | None
    """None when it is unsigned, or signed by a key that is not trusted here."""


@dataclass(frozen=True)
class Delivery:
    """How a release is to arrive."""

    branch: str = "main"
    """Made from main where it is not there yet."""
    private: bool = False
    """Make a new repository readable by its owner alone."""
    as_pull_request: bool = False
    """Leave the branch alone, and propose the commit."""
    message: str | None = None
    """Of the commit; None: ``Release NAME VERSION``."""


def push(
    release: Release,
    repo: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    delivery: Delivery | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Publish a release as one commit on a branch of ``repo`` (``owner/name``), and tag its version.

    A release of kind dataset goes to the dataset repository of that name, any other to the model repository.
    The release is checked first, and its signature too. A repository that does not exist is made, readable by
    all or, if ``delivery`` says so, by its owner. Files whose content is on the Hub already are not sent;
    those that the release there lists and this one does not are deleted; whatever else lies there stays.

    A version never moves, and is never used again for other content or other signatures, its tag deleted or
    not. The same release again changes nothing, and completes a push that was cut off before the tag. A
    version must be above all others there, or else the next of an older line (1.0.2 after 1.0.1, with 1.1.0
    there). ``dry_run`` asks the Hub, and changes nothing.

    As a pull request the commit gets no tag: the same push again gives it one when it was merged, and before
    that finds the pull request that is open. ``progress`` is told the bytes of the large files that were
    sent, and of all that are to be; a Hub that takes them through Xet leaves that to huggingface_hub's bars.

    Raises SignatureError for a release that is not what its manifest or its signature says, VersionError for
    a version that is taken or too low, ConflictError when somebody else pushed at the same time,
    ReleaseError for a card whose metadata the Hub refuses, RefError, AuthError, HubError.
    """
    ref = parse_ref(repo)
    if ref.revision is not None:
        raise RefError(f"{repo!r} names a revision", f"push to {ref.repo}: the version is the release's own")
    held = hold_small_files(release.path, release.manifest.files)
    known = {name: file.sha256 for name, file in held.items()}
    delivery = delivery or Delivery()
    with ThreadPoolExecutor(1) as pool:  # while a core hashes, the Hub is asked
        checking = pool.submit(check_release, release.path, publisher=ref.repo, known=known)
        try:
            api = connect(endpoint, token)
            head = _look(api, ref, delivery, repo_type_of(release))
        finally:
            checked = checking.result()  # what is wrong with the release is said first
    release, signer = checked.release, checked.signer  # as it is now, whatever was done since it was opened
    tag = tag_of(release.manifest.version)
    if head.commit is None and not dry_run:
        head = _create(api, ref, delivery, repo_type_of(release))
    if tag in head.tags:
        return _check_same(api, ref, release, tag, head, signer, held)
    _check_order(release.manifest.version, head.tags)
    target = find_earlier(api, ref, release, head, held) or head
    changes, kept = compare_files(api, ref, release, target, held)
    there = all(change.change == "unchanged" for change in changes)
    if delivery.as_pull_request and not there:
        before, unchanged = _find_proposed(api, ref, release, head, delivery, held)
        if before is not None:
            outcome: Outcome = "proposed before"
            return Pushed(ref.repo, tag, outcome, before.commit, before.url, unchanged, kept, signer)
    if dry_run:
        commit = target.commit if there else None
        url = _url(api, ref, release, commit)
        return Pushed(ref.repo, tag, "dry run", commit, url, changes, kept, signer)
    commit, proposal = target.commit, None
    if not there:
        commit, proposal = _commit(api, ref, release, head, changes, delivery, held, progress)
    assert commit is not None  # the repository is there by now
    if proposal is not None:
        return Pushed(ref.repo, tag, "proposed", commit, proposal, changes, kept, signer)
    _tag(api, ref, release, tag, commit)
    outcome = "tagged" if there else "pushed"
    return Pushed(ref.repo, tag, outcome, commit, _url(api, ref, release, commit), changes, kept, signer)


def _look(api: HfApi, ref: Ref, delivery: Delivery, repo_type: RepoType) -> Head:
    """What is there now. Raises HubError when ``private`` is wanted of a repository that everybody can
    read, RefError for a pull request against what is not there."""
    named = parse_ref(f"{ref.repo}@{delivery.branch}")
    if named.version is not None or named.is_commit or delivery.branch.startswith("refs/"):
        raise RefError(f"{delivery.branch!r} names a version or a commit, not a branch", "name a branch")
    info = look_up(api, ref, repo_type)
    if info is None or info.sha is None:
        if delivery.as_pull_request:
            raise RefError(
                f"{api.endpoint} has no repository {ref} to propose anything to", "push without --create-pr"
            )
        return Head(None, {}, {}, delivery.branch == "main", frozenset())
    if delivery.private and not info.private:
        raise HubError(
            f"{ref} exists and everybody can read it, but --private was asked for",
            "make it private on the Hub first, or push to another repository",
        )
    with hub_errors(api, ref):
        refs = api.list_repo_refs(ref.repo, repo_type=repo_type)
    branches = {it.name: it.target_commit for it in refs.branches} | {"main": info.sha}
    if delivery.as_pull_request and delivery.branch not in branches:
        raise RefError(f"{ref} has no branch {delivery.branch}", "name a branch that is there")
    commit = branches.get(delivery.branch, info.sha)
    tags = {it.name: it.target_commit for it in refs.tags}
    files = list_files(api, ref, commit, repo_type)
    return Head(commit, files, tags, delivery.branch in branches, frozenset(branches.values()))


def _check_same(
    api: HfApi,
    ref: Ref,
    release: Release,
    tag: str,
    head: Head,
    signer: Signer | None,
    held: Mapping[str, HeldFile],
) -> Pushed:
    """What a push does whose version is there: nothing, if it is the same release. Raises VersionError if
    not."""
    at_tag, target, repo_type = Ref(ref.repo, tag), head.tags[tag], repo_type_of(release)
    if target != head.commit:
        with hub_errors(api, at_tag):  # an annotated tag's target is the tag itself
            target = api.repo_info(ref.repo, revision=tag, repo_type=repo_type).sha or target
        head = replace(head, commit=target, files=list_files(api, at_tag, target, repo_type))
    commit = head.commit
    changes, kept = compare_files(api, at_tag, release, head, held)
    different = [change.name for change in changes if change.change != "unchanged"]
    if different:
        raise VersionError(
            f"{at_tag} is there with other content ({', '.join(different[:3])}), and a version never changes",
            f"give the release a version above {tag.removeprefix('v')}",
        )
    url = _url(api, ref, release, commit)
    return Pushed(ref.repo, tag, "already there", commit, url, changes, kept, signer)


def _check_order(version: str, tags: Mapping[str, str]) -> None:
    """Raise VersionError unless ``version`` is above all others, or the next one of an older line."""
    ours = parse_version(version)
    others = {parse_version(tag): tag for tag in tags if tag.startswith("v") and version_of(tag)}
    line = [other for other in others if other.release[:2] == ours.release[:2]]
    if all(ours > other for other in (line or others)):
        return
    highest = max(line or others)
    raise VersionError(
        f"version {version} is below {others[highest].removeprefix('v')}, which is on the Hub",
        f"give the release a version above {(highest_version(tags) or others[highest]).removeprefix('v')}",
    )


def _commit(
    api: HfApi,
    ref: Ref,
    release: Release,
    head: Head,
    changes: Iterable[FileChange],
    delivery: Delivery,
    held: Mapping[str, HeldFile],
    progress: Progress | None,
) -> tuple[str, str | None]:
    """Send what changed, in one commit onto the head that was looked at -> the commit, and the address of the
    pull request if it became one."""
    repo_type, parent = repo_type_of(release), head.commit
    assert parent is not None
    if not head.has_branch:
        with hub_errors(api, ref):
            api.create_branch(
                ref.repo, branch=delivery.branch, revision=parent, repo_type=repo_type, exist_ok=True
            )
    add = {it.name: release.path / it.name for it in changes if it.change in ("new", "changed")}
    delete = [it.name for it in changes if it.change == "deleted"]
    digests = {name: entry.sha256 for name, entry in release.manifest.files.items()}
    try:
        made = commit_files(
            api,
            ref.repo,
            add,
            delete,
            message=_message(release, delivery),
            description=state_version(release),
            parent=parent,
            branch=delivery.branch,
            as_pull_request=delivery.as_pull_request,
            digests=digests,
            held=held,
            repo_type=repo_type,
            progress=progress,
        )
    except ConflictError as err:
        now = _look(api, ref, delivery, repo_type)
        changed, _ = compare_files(api, ref, release, now)
        if now.commit and not delivery.as_pull_request and all(it.change == "unchanged" for it in changed):
            return now.commit, None  # an earlier push's, on its way till now
        raise who_moved(api, ref, delivery.branch, parent, repo_type) or err from err
    commit = str(made.oid)
    _check_arrived(api, ref, release, commit, held)
    return commit, made.pr_url and str(made.pr_url)


def _find_proposed(
    api: HfApi,
    ref: Ref,
    release: Release,
    head: Head,
    delivery: Delivery,
    held: Mapping[str, HeldFile],
) -> tuple[Proposal | None, tuple[FileChange, ...]]:
    """The pull request that an earlier push of this very release made, and its files, all unchanged."""
    repo_type = repo_type_of(release)
    for proposal in find_proposals(api, ref, repo_type):
        there = list_files(api, ref, proposal.commit, repo_type)
        manifest = there.get(MANIFEST_NAME)
        if manifest is None or not manifest.is_content_of(release.path / MANIFEST_NAME):
            continue
        proposed = replace(head, commit=proposal.commit, files=there)
        compared, _ = compare_files(api, ref, release, proposed, held)
        if all(change.change == "unchanged" for change in compared) and is_against(
            api, ref, proposal, delivery.branch, repo_type
        ):
            return proposal, compared
    return None, ()


def _message(release: Release, delivery: Delivery) -> str:
    return delivery.message or f"Release {release.manifest.name} {release.manifest.version}"


def _check_arrived(api: HfApi, ref: Ref, release: Release, commit: str, held: Mapping[str, HeldFile]) -> None:
    """Raise when the commit is not the release that was checked: before it has a version, that can be
    mended. HubError for what arrived otherwise, SignatureError for what was changed here meanwhile.

    What is ``held`` is compared as it was checked; other files that git holds are hashed once more."""
    there = list_files(api, ref, commit, repo_type_of(release))
    in_git = {name for name, file in there.items() if file.sha256 is None}
    release.check_files(only=in_git & release.manifest.files.keys() - held.keys())
    wrong = sorted(
        name
        for name in names_of(release)
        if change_of(release, name, there.get(name), held).change != "unchanged"
    )
    if wrong:
        raise HubError(
            f"{ref} at {commit} is not what was pushed ({', '.join(wrong[:3])}), so it got no tag",
            "push again, and leave the release's folder alone meanwhile",
        )


def _create(api: HfApi, ref: Ref, delivery: Delivery, repo_type: RepoType) -> Head:
    """Make the repository; return what it holds. One that has just been made by somebody else will do."""
    with suppress(ConflictError), hub_errors(api, ref):
        # None leaves it to the Hub: an organisation may have made private its own default.
        api.create_repo(ref.repo, repo_type=repo_type, private=True if delivery.private else None)
    head = _look(api, ref, delivery, repo_type)
    if head.commit is None:
        raise HubError(f"{api.endpoint} made {ref} without a first commit", "check that it is a Hub")
    return head


def _tag(api: HfApi, ref: Ref, release: Release, tag: str, commit: str) -> None:
    """Name the commit; a tag that another push of the same commit has just made will do."""
    repo_type = repo_type_of(release)
    try:
        with hub_errors(api, ref):
            api.create_tag(ref.repo, tag=tag, revision=commit, repo_type=repo_type)
    except ConflictError as err:
        try:
            with hub_errors(api, ref):
                taken = api.repo_info(ref.repo, revision=tag, repo_type=repo_type).sha
        except RefError:  # there is none: a Hub that remembers the versions whose tags were deleted
            raise VersionError(
                f"{err.what}; your files are at commit {commit}, without a tag",
                f"give the release a version above {release.manifest.version} and push again",
            ) from err
        if taken == commit:
            return
        raise ConflictError(
            f"{ref}: somebody else took {tag} meanwhile; your files are at commit {commit}, without a tag",
            f"give the release a version above {release.manifest.version} and push again",
        ) from err


def _url(api: HfApi, ref: Ref, release: Release, commit: str | None) -> str:
    folder = "datasets/" if repo_type_of(release) == "dataset" else ""
    page = f"{api.endpoint}/{folder}{ref.repo}"
    return page if commit is None else f"{page}/commit/{commit}"
