"""Which versions a repository has ever been pushed: its commits say so, whatever became of the tags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterhub.errors import VersionError
from adapterhub.hub.changes import Head, compare_files, repo_type_of
from adapterhub.hub.client import hub_errors
from adapterhub.hub.held import HeldFile
from adapterhub.hub.refs import Ref
from adapterhub.hub.snapshots import list_files
from adapterhub.packaging.bundles import is_signature
from adapterhub.packaging.release import Release

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_STATED = re.compile(r"^Version: (\S+) \(manifest sha256:([0-9a-f]{64})\)$", re.MULTILINE)


def state_version(release: Release) -> str:
    """The line of a commit's message by which later pushes know what had this version."""
    return f"Version: {release.manifest.version} (manifest sha256:{release.digest})"


def find_earlier(
    api: HfApi, ref: Ref, release: Release, head: Head, held: Mapping[str, HeldFile]
) -> Head | None:
    """What had the release's version before and has no tag: the very same release, or else None.

    A tag can be deleted on a Hub, or a push have died before it; whoever pulled the version has it still.
    History that its owner squashed tells nothing. ``held``: see ``compare_files``. Raises VersionError when a
    commit below the repository's branches was another release of the same version, or this one with other
    signatures; AuthError, HubError.
    """
    repo_type, version = repo_type_of(release), release.manifest.version
    same = []
    for tip in head.branches:
        with hub_errors(api, ref):
            commits = api.list_repo_commits(ref.repo, revision=tip, repo_type=repo_type)
        for commit in commits:
            for stated, digest in _STATED.findall(commit.message or ""):
                if stated == version and digest != release.digest:
                    raise _taken(ref, version, "other content", commit.commit_id)
                if stated == version:
                    same.append(commit)
    if not same:
        return None
    first = min(reversed(same), key=lambda commit: commit.created_at).commit_id
    earlier = replace(head, commit=first, files=list_files(api, ref, first, repo_type))
    changes, _kept = compare_files(api, ref, release, earlier, held)
    different = [change.name for change in changes if change.change != "unchanged"]
    if not different:
        return earlier
    if all(is_signature(name) for name in different):
        raise _taken(ref, version, "other signatures", first)
    return None  # what arrived there was never this release: such a push gives no tag


def _taken(ref: Ref, version: str, what: str, commit: str) -> VersionError:
    return VersionError(
        f"{ref} had {what} as {version} at commit {commit[:12]}, though no tag says so any more, and a "
        "version is never used again",
        f"give the release a version above {version}, or push what is there: "
        f"adapterhub pull {ref.repo}@{commit} --out DIR",
    )
