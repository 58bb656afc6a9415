"""Changing what a repository holds: which way each file should come, and the commit that takes them in."""

from __future__ import annotations

import base64
import binascii
from typing import Any, BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from adapterhub.hub.server import xet
from adapterhub.hub.server.attributes import Matcher, ignore_matcher, large_file_matcher, looks_binary
from adapterhub.hub.server.calls import Call, author_line, endpoint, limited, streaming_endpoint
from adapterhub.hub.server.commits import Draft, apply_draft, read_draft
from adapterhub.hub.server.discussions import Discussions
from adapterhub.hub.server.names import RepoId
from adapterhub.hub.server.refusals import Refusal, bad_request
from adapterhub.hub.server.repository import Files, Repository

_MAX_FILES = 4096


def preupload(call: Call) -> dict[str, Any]:
    """For each file: through LFS or inside the commit, ignored or not, and what stands there now."""
    repo = call.repo()
    call.contributor()
    asked = call.document().get("files")
    if not isinstance(asked, list) or len(asked) > _MAX_FILES:
        raise bad_request(f"files is a list of at most {_MAX_FILES} files")
    with call.contents(repo) as repository:
        files = repository.files(repository.commit_id(call.param("revision")))
        is_large = large_file_matcher(_contents(repository, files, ".gitattributes"))
        gitignore = call.document().get("gitIgnore")
        ignored = ignore_matcher(
            gitignore.encode() if isinstance(gitignore, str) else _contents(repository, files, ".gitignore")
        )
        return {"files": [_upload_mode(call, repository, files, row, is_large, ignored) for row in asked]}


def _upload_mode(
    call: Call, repository: Repository, files: Files, row: Any, is_large: Matcher, ignored: Matcher
) -> dict[str, Any]:
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("path"), str)
        or not isinstance(row.get("size"), int)
    ):
        raise bad_request("Each of files has a path and a size")
    path, size = row["path"], row["size"]
    try:
        sample = base64.b64decode(row.get("sample") or "", validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise bad_request(f"The sample of {path!r} is not base64") from None
    large = size > 0 and (
        size > call.hub.limits.regular_file
        or is_large(path)
        or looks_binary(sample, whole=len(sample) == size)
    )
    mode: dict[str, Any] = {
        "path": path,
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": ignored(path),
    }
    if path in files:
        entry = repository.entry(path, files[path][1])
        mode["oid"] = entry.pointer.sha256 if entry.pointer else entry.oid
    return mode


def _contents(repository: Repository, files: Files, path: str) -> bytes:
    return repository.read(files[path][1].decode()) if path in files else b""


async def commit(call: Call) -> Response:
    """Take in a commit: read it to the disk first, then apply it under the repository's lock."""
    repo = call.repo() if call.flag("create_pr") else call.repo(write=True)
    call.contributor()
    spool = call.hub.store.temporary_path()
    try:
        file = await run_in_threadpool(spool.open, "x+b")
        with file:
            async for chunk in limited(call.request, call.hub.limits.commit_body):
                file.write(chunk)
            file.seek(0)
            return JSONResponse(await run_in_threadpool(_land, call, repo, file))
    finally:
        spool.unlink(missing_ok=True)


def _land(call: Call, repo: RepoId, lines: BinaryIO) -> dict[str, Any]:
    account = call.signed_in()
    revision = call.param("revision")
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        # Who waited for the lock may find the repository gone.
        base = repository.commit_id(revision) if call.flag("create_pr") else None
        reference = repository.writable_ref(revision) if base is None else ""
        draft = read_draft(lines, repository, call.hub.limits)
        head = base or repository.commit_id(reference)
        _check_parent(draft, head, revision)
        landed = apply_draft(repository, draft, head, author_line(account))
        answer: dict[str, Any] = {"success": True, "commitOid": landed, "hookOutput": ""}
        answer["commitUrl"] = f"{call.endpoint}/{repo.address}/commit/{landed}"
        if base is not None:
            number = Discussions(repository).open_pull_request(
                account.user, draft.title, draft.description, base, landed, revision
            )
            answer["pullRequestUrl"] = f"{call.endpoint}/{repo.address}/discussions/{number}"
        elif landed != head:
            repository.move_ref(reference, head, landed)
        large_files = call.hub.store.large_files(repo)
        xet.drop_emptied(large_files, [operation.large for operation in draft.operations if operation.large])
    return answer


def _check_parent(draft: Draft, head: str, revision: str) -> None:
    if draft.parent is not None and draft.parent != head:
        raise Refusal(
            412,
            f"A commit has happened since: {revision} is at {head}, not at {draft.parent} as this commit"
            " expects. Fetch it and try again",
            "PreconditionFailed",
        )


_REPO = "/api/{kind}/{owner}/{name}"

ROUTES = [
    Route(f"{_REPO}/preupload/{{revision}}", endpoint(preupload, "json"), methods=["POST"]),
    Route(f"{_REPO}/commit/{{revision}}", streaming_endpoint(commit), methods=["POST"]),
]
