"""Which versions a repository has ever been pushed: its commits say so, whatever became of the tags."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapterhub.errors import VersionError
from adapterhub.hub.client import RepoType, hub_errors
from adapterhub.hub.refs import Ref
from adapterhub.packaging.release import Release

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_STATED = re.compile(r"^Version: (\S+) \(manifest sha256:([0-9a-f]{64})\)$", re.MULTILINE)


def state_version(release: Release) -> str:
    """The line of a commit's message by which later pushes know what had this version."""
    return f"Version: {release.manifest.version} (manifest sha256:{release.digest})"


def check_unused(api: HfApi, ref: Ref, release: Release, heads: Iterable[str], repo_type: RepoType) -> None:
    """Raise VersionError when a commit below ``heads`` was another release of the same version.

    A tag can be deleted on a Hub; whoever pulled the version before has it still. What had it may have it
    again: a push that died before its tag is completed so. History that its owner squashed tells nothing.
    Raises AuthError, HubError.
    """
    for head in heads:
        with hub_errors(api, ref):
            commits = api.list_repo_commits(ref.repo, revision=head, repo_type=repo_type)
        for commit in commits:
            for version, digest in _STATED.findall(commit.message or ""):
                if version == release.manifest.version and digest != release.digest:
                    raise VersionError(
                        f"{ref} had other content as {version} at commit {commit.commit_id[:12]}, though no "
                        "tag says so any more, and a version is never used again",
                        f"give the release a version above {version}",
                    )
