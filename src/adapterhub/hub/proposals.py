"""Pull requests on a Hub, and what others did to a branch meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub.errors import ConflictError
from adapterhub.hub.client import RepoType, hub_errors
from adapterhub.hub.refs import Ref

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Proposal:
    """An open pull request."""

    number: int
    commit: str
    """Its head, 40 hex digits."""
    url: str


def find_proposals(api: HfApi, ref: Ref, repo_type: RepoType) -> Iterator[Proposal]:
    """The open pull requests of a repository, against whichever branch. Raises AuthError, HubError."""
    with hub_errors(api, ref):
        found = api.get_repo_discussions(
            ref.repo, repo_type=repo_type, discussion_type="pull_request", discussion_status="open"
        )
        for it in found:
            commit = api.repo_info(ref.repo, revision=f"refs/pr/{it.num}", repo_type=repo_type).sha
            if commit is not None:
                yield Proposal(it.num, commit, it.url)


def is_against(api: HfApi, ref: Ref, proposal: Proposal, branch: str, repo_type: RepoType) -> bool:
    """Whether a pull request is to be merged into a branch. Raises AuthError, HubError."""
    with hub_errors(api, ref):
        details = api.get_discussion_details(ref.repo, proposal.number, repo_type=repo_type)
    return details.target_branch == f"refs/heads/{branch}"


def who_moved(api: HfApi, ref: Ref, branch: str, parent: str, repo_type: RepoType) -> ConflictError | None:
    """The error that names who put what onto a branch after ``parent``; None when nobody did."""
    with hub_errors(api, ref):
        newest = api.list_repo_commits(ref.repo, revision=branch, repo_type=repo_type)[0]
    if newest.commit_id == parent:
        return None
    who = " and ".join(newest.authors) or "somebody"
    return ConflictError(
        f"{ref}: {who} moved {branch} meanwhile, to commit {newest.commit_id[:12]} “{newest.title}”; "
        "nothing of yours was written",
        "look at what is there now, and push again",
    )
