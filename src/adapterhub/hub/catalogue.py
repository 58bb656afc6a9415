"""What a Hub holds: repositories found by owner, base and task, what one release is, and keeping house."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from adapterhub.errors import AuthError, RefError
from adapterhub.hub.client import PUBLIC_HUB, RepoType, connect, hub_errors, list_tags
from adapterhub.hub.pull import Pulled, newest, pull
from adapterhub.hub.refs import Ref, highest_version, parse_ref, tag_of, version_of
from adapterhub.packaging.behaviour import Change, find_changes
from adapterhub.packaging.manifest import parse_version

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi, ModelInfo

_TAG: Final = "adapterhub"  # every card that adapterhub makes carries it
_BASE, _TASK, _LICENCE = "base_model:", "task_categories:", "license:"
_AT_ONCE: Final = 8


@dataclass(frozen=True)
class Listed:
    """A repository, as its Hub tells of it; nothing here is checked."""

    repo: str
    """``owner/name``."""
    private: bool
    modified: str | None
    """ISO 8601, UTC."""
    version: str | None
    """The highest; None when it has no version tag."""
    base: str | None
    """As its card names it."""
    task: str | None
    """The Hub's word for it, like ``text-generation``."""
    licence: str | None


@dataclass(frozen=True)
class Described:
    """One release on a Hub, looked at without its weights."""

    pulled: Pulled
    """Manifest and signatures checked, and the files that tell of it."""
    versions: tuple[str, ...]
    """All that the repository has tags of, the highest first."""
    previous: str | None
    """The version before this one there."""
    changes: tuple[Change, ...] | None
    """What differs from it; None without one. Of weights and tokens: that they differ, not by how much."""


def list_repos(
    owner: str | None, repo_type: RepoType = "model", *, endpoint: str | None = None, token: str | None = None
) -> list[Listed]:
    """The repositories of ``owner`` that the token may see, the latest change first.

    Without ``owner``, all of a Hub of one's own, and the token's user's on the public Hub. Raises AuthError
    when nobody is named there and no token tells, HubError.
    """
    api = connect(endpoint, token)
    if owner is None and api.endpoint == PUBLIC_HUB:
        with hub_errors(api, "your own repositories"):
            owner = api.whoami().get("name")
        if not owner:
            raise AuthError("the token names no user", "name an owner: adapterhub list OWNER")
    with hub_errors(api, owner or api.endpoint):
        if repo_type == "dataset":
            found: Iterable[ModelInfo | DatasetInfo] = list(api.list_datasets(author=owner))
        else:
            found = list(api.list_models(author=owner))
    return _with_versions(api, found, repo_type)


def search_repos(
    words: str | None = None,
    *,
    base: str | None = None,
    task: str | None = None,
    repo_type: RepoType = "model",
    limit: int = 30,
    endpoint: str | None = None,
    token: str | None = None,
) -> list[Listed]:
    """Releases whose names hold ``words``, made of ``base`` (``owner/name``), for ``task`` (the Hub's word).

    Releases are told by the tag that adapterhub's cards carry. Raises HubError.
    """
    api = connect(endpoint, token)
    wanted = [_TAG, *([_BASE + base] if base else [])]
    with hub_errors(api, api.endpoint):
        if repo_type == "dataset":
            wanted += [_TASK + task] if task else []
            found: Iterable[ModelInfo | DatasetInfo] = api.list_datasets(search=words, filter=wanted)
        else:
            found = api.list_models(search=words, filter=wanted, pipeline_tag=task)
        found = list(islice(found, limit))
    return _with_versions(api, found, repo_type)


def describe(
    ref: str, repo_type: RepoType = "model", *, endpoint: str | None = None, token: str | None = None
) -> Described:
    """A release on a Hub: checked as a pull does, but without its weights; and what it changed.

    Raises what ``pull`` raises.
    """
    api, asked = connect(endpoint, token), parse_ref(ref)
    tags = list_tags(api, asked, repo_type)
    named = (version_of(tag) for tag in tags if tag.startswith("v"))
    versions = sorted((it for it in named if it is not None), key=parse_version, reverse=True)
    look = partial(pull, endpoint=endpoint, token=token, repo_type=repo_type, only="facts")
    pulled = look(newest(api, asked, repo_type))
    ours = parse_version(pulled.release.manifest.version)
    previous = next((it for it in versions if parse_version(it) < ours), None)
    changes = None
    if previous is not None:
        older = look(Ref(pulled.repo, tag_of(previous)))
        changes = find_changes(older.release, pulled.release)
    return Described(pulled, tuple(versions), previous, changes)


def move_repo(
    source: str,
    target: str,
    repo_type: RepoType = "model",
    *,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Give a repository another name, or another owner; return its new address.

    Raises RefError for a name that is none or has a revision, ConflictError when the new one is taken,
    AuthError, HubError.
    """
    api = connect(endpoint, token)
    old, new = _whole(source), _whole(target)
    with hub_errors(api, old):
        api.move_repo(old.repo, new.repo, repo_type=repo_type)
    return f"{api.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{new.repo}"


def remove_tag(
    ref: str, repo_type: RepoType = "model", *, endpoint: str | None = None, token: str | None = None
) -> str:
    """Take a tag off a repository; return the commit that it named, which stays, with its files.

    Raises RefError when there is no such tag, AuthError, HubError.
    """
    api, named = connect(endpoint, token), parse_ref(ref)
    if named.revision is None:
        raise RefError(f"{ref!r} names no tag", f"write {ref}@VERSION")
    tags = list_tags(api, named, repo_type)
    if named.revision not in tags:
        raise RefError(
            f"{named.repo} has no tag {named.revision}", f"it has {', '.join(sorted(tags)[-5:]) or 'none'}"
        )
    with hub_errors(api, named):
        commit = api.repo_info(named.repo, revision=named.revision, repo_type=repo_type).sha
        api.delete_tag(named.repo, tag=named.revision, repo_type=repo_type)
    return commit or tags[named.revision]


def _whole(name: str) -> Ref:
    ref = parse_ref(name)
    if ref.revision is not None:
        raise RefError(f"{name!r} names a revision", f"a repository moves as a whole: {ref.repo}")
    return ref


def _with_versions(api: HfApi, found: Iterable[ModelInfo | DatasetInfo], repo_type: RepoType) -> list[Listed]:
    def complete(info: ModelInfo | DatasetInfo) -> Listed:
        tags = info.tags or []
        highest = highest_version(list_tags(api, Ref(info.id, None), repo_type))
        return Listed(
            repo=info.id,
            private=bool(info.private),
            modified=info.last_modified.isoformat() if info.last_modified else None,
            version=highest and highest.removeprefix("v"),
            base=_after(_BASE, (tag for tag in tags if tag.count(":") == 1)),
            task=getattr(info, "pipeline_tag", None) or _after(_TASK, tags),
            licence=_after(_LICENCE, tags),
        )

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        listed = list(pool.map(complete, found))
    return sorted(listed, key=lambda it: it.modified or "", reverse=True)


def _after(prefix: str, tags: Iterable[str]) -> str | None:
    return next((tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix)), None)
