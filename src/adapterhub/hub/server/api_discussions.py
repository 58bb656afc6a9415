"""Discussions and pull requests over HTTP."""

from __future__ import annotations

from typing import Any

from starlette.routing import Route

from adapterhub.hub.server.calls import Call, author_line, endpoint
from adapterhub.hub.server.discussions import Discussion, Discussions
from adapterhub.hub.server.names import RepoId
from adapterhub.hub.server.refusals import Refusal, bad_request, forbidden

_PAGE = 50


def list_discussions(call: Call) -> dict[str, Any]:
    """Newest first; ``type``, ``status``, ``author`` and the page number ``p``."""
    repo = call.repo()
    page = call.query("p") or "0"
    start = int(page) * _PAGE if page.isdigit() else 0
    with call.contents(repo) as repository:
        found = [item for item in Discussions(repository).all() if _matches(call, item)]
    shown = [_describe(repo, discussion) for discussion in found[start : start + _PAGE]]
    return {"discussions": shown, "count": len(found), "start": start}


def _matches(call: Call, discussion: Discussion) -> bool:
    type_, status, author = call.query("type"), call.query("status"), call.query("author")
    is_pull_request, is_open = discussion.base is not None, discussion.status in ("open", "draft")
    return (
        (type_ in (None, "all") or is_pull_request == (type_ == "pull_request"))
        and (status in (None, "all") or is_open == (status == "open"))
        and author in (None, discussion.author)
    )


def get_discussion(call: Call) -> dict[str, Any]:
    repo = call.repo()
    with call.contents(repo) as repository:
        discussions = Discussions(repository)
        discussion = discussions.get(discussion_number(call))
        described = {**_describe(repo, discussion), "events": list(discussion.events)}
        if discussion.base is not None:
            described["filesWithConflicts"] = discussions.conflicts(discussion)
            described["changes"] = {
                "base": f"refs/heads/{discussion.target}",
                "mergeCommitId": discussion.merge_commit,
            }
            if call.flag("diff"):
                described["diff"] = discussions.diff(discussion)
    return described


def open_discussion(call: Call) -> dict[str, Any]:
    repo = call.repo()
    account = call.contributor()
    title, description = call.text("title").strip(), call.text("description", "")
    if not title:
        raise bad_request("A discussion needs a title")
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        discussions = Discussions(repository)
        if call.document().get("pullRequest"):
            base = repository.commit_id("refs/heads/main")
            number = discussions.open_pull_request(
                account.user, title, description, base, base, "main", "draft"
            )
        else:
            number = discussions.open_discussion(account.user, title, description)
    return {"num": number, "url": f"{call.endpoint}/{repo.address}/discussions/{number}"}


def comment(call: Call) -> dict[str, Any]:
    repo = call.repo()
    account = call.contributor()
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        return {
            "newMessage": Discussions(repository).comment(
                discussion_number(call), account.user, call.text("comment")
            )
        }


def rename(call: Call) -> dict[str, Any]:
    repo = call.repo()
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        discussions = Discussions(repository)
        user = _own_or_maintained(call, repo, discussions.get(discussion_number(call)))
        return {"newTitle": discussions.rename(discussion_number(call), user, call.text("title"))}


def change_status(call: Call) -> dict[str, Any]:
    repo = call.repo()
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        discussions = Discussions(repository)
        user = _own_or_maintained(call, repo, discussions.get(discussion_number(call)))
        if note := call.text("comment", ""):
            discussions.comment(discussion_number(call), user, note)
        return {"newStatus": discussions.change_status(discussion_number(call), user, call.text("status"))}


def merge(call: Call) -> dict[str, Any]:
    repo = call.repo(write=True)
    account = call.signed_in()
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        discussions = Discussions(repository)
        commit = discussions.merge(
            discussion_number(call), account.user, author_line(account), call.text("comment", "")
        )
    return {"mergeCommitId": commit}


def _own_or_maintained(call: Call, repo: RepoId, discussion: Discussion) -> str:
    """The caller, if the discussion is theirs or the repository is theirs to change."""
    account = call.contributor()
    if account.user != discussion.author and not account.may_write(repo.owner):
        raise forbidden(f"#{discussion.num} belongs to {discussion.author}")
    return account.user


def discussion_number(call: Call) -> int:
    """Which discussion the address names. Raises Refusal (404) for what is no number."""
    number = call.param("number")
    if not number.isascii() or not number.isdigit() or len(number) > 9:
        raise Refusal(404, f"Discussion {number} not found")
    return int(number)


def _describe(repo: RepoId, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "status": discussion.status,
        "author": {"name": discussion.author},
        "createdAt": discussion.created,
        "isPullRequest": discussion.base is not None,
        "repo": {"name": repo.full_name, "type": repo.type},
    }


_DISCUSSIONS = "/api/{kind}/{owner}/{name}/discussions"

ROUTES = [
    Route(_DISCUSSIONS, endpoint(list_discussions)),
    Route(_DISCUSSIONS, endpoint(open_discussion, "json"), methods=["POST"]),
    Route(f"{_DISCUSSIONS}/{{number}}", endpoint(get_discussion)),
    Route(f"{_DISCUSSIONS}/{{number}}/comment", endpoint(comment, "json"), methods=["POST"]),
    Route(f"{_DISCUSSIONS}/{{number}}/title", endpoint(rename, "json"), methods=["POST"]),
    Route(f"{_DISCUSSIONS}/{{number}}/status", endpoint(change_status, "json"), methods=["POST"]),
    Route(f"{_DISCUSSIONS}/{{number}}/merge", endpoint(merge, "json"), methods=["POST"]),
]
