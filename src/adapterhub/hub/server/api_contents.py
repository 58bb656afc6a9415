"""What a repository holds at a revision: listings, history, refs, and the files themselves."""

from __future__ import annotations

import mimetypes
import re
import stat
from typing import Any
from urllib.parse import quote, urlencode

from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from adapterhub.hub.server.calls import Call, author_line, endpoint
from adapterhub.hub.server.names import PAGE_PREFIXES, RepoId
from adapterhub.hub.server.refusals import Refusal, bad_request, conflict, entry_not_found
from adapterhub.hub.server.repository import Entry, Repository, describe_commit

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


# Listings


def list_tree(call: Call) -> Response:
    """Files and folders below a path, in git's order; ``recursive``, ``expand``, ``limit`` and ``cursor``."""
    path = call.param("path").strip("/") if "path" in call.request.path_params else ""
    with call.contents(call.repo()) as repository:
        commit, start = _cursor(call, repository)
        mode, oid = repository.lookup(commit, path)
        if not stat.S_ISDIR(mode):
            raise entry_not_found(path, commit)
        rows = _walk(repository, oid, f"{path}/" if path else "", recursive=call.flag("recursive"))
        end = start + _limit(call)
        page = rows[start:end]
        answer = _list_entries(repository, commit, page, expand=call.flag("expand"))
    response = JSONResponse(answer, headers={"X-Repo-Commit": commit})
    if end < len(rows):
        response.headers["Link"] = _next_page(call, f"{commit}.{end}")
    return response


def paths_info(call: Call) -> list[dict[str, Any]]:
    """The entries of some paths; those that are not there are left out."""
    paths = call.body.get("paths", [])
    expand = call.body.get("expand", ["false"])[-1].lower() in ("1", "true")
    with call.contents(call.repo()) as repository:
        commit = repository.commit_id(call.param("revision"))
        found = []
        for path in dict.fromkeys(path.strip("/") for path in paths):
            try:
                found.append((path, *repository.lookup(commit, path)))
            except Refusal:
                continue
        return _list_entries(repository, commit, found, expand=expand)


def list_commits(call: Call) -> Response:
    """The history of a revision, newest first."""
    with call.contents(call.repo()) as repository:
        commit, start = _cursor(call, repository)
        history = repository.history(commit)
        end = start + _limit(call)
        page = [
            describe_commit(item)
            for index, item in zip(range(end + 1), history, strict=False)
            if index >= start
        ]
    response = JSONResponse(page[: end - start])
    if len(page) > end - start:
        response.headers["Link"] = _next_page(call, f"{commit}.{end}")
    return response


def _walk(
    repository: Repository, tree: bytes, prefix: str, *, recursive: bool
) -> list[tuple[str, int, bytes]]:
    rows = []
    for name, mode, oid in repository.folder(tree).items():
        path = prefix + name.decode("utf-8", "replace")
        if stat.S_ISDIR(mode) or stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            rows.append((path, mode, oid))
        if recursive and stat.S_ISDIR(mode):
            rows += _walk(repository, oid, f"{path}/", recursive=True)
    return rows


def _list_entries(
    repository: Repository, commit: str, rows: list[tuple[str, int, bytes]], *, expand: bool
) -> list[dict[str, Any]]:
    listed = [_list_entry(repository, *row) for row in rows]
    if expand:
        changed = repository.last_changes(commit, [path for path, _, _ in rows])
        for entry in listed:
            last = describe_commit(changed[entry["path"]])
            entry["lastCommit"] = {"id": last["id"], "title": last["title"], "date": last["date"]}
    return listed


def _list_entry(repository: Repository, path: str, mode: int, oid: bytes) -> dict[str, Any]:
    if stat.S_ISDIR(mode):
        return {"type": "directory", "oid": oid.decode(), "size": 0, "path": path}
    entry = repository.entry(path, oid)
    listed: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.pointer:
        listed["lfs"] = {"oid": entry.pointer.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return listed


def _limit(call: Call) -> int:
    asked = call.query("limit") or ""
    most = call.hub.limits.page
    return min(int(asked), most) if asked.isdigit() and int(asked) > 0 else most


def _cursor(call: Call, repository: Repository) -> tuple[str, int]:
    """The commit a listing began with, so that its pages fit together, and where to go on in it."""
    cursor = call.query("cursor")
    if cursor is None:
        return repository.commit_id(call.param("revision")), 0
    commit, _, start = cursor.partition(".")
    if not start.isdigit():
        raise bad_request("Invalid cursor")
    return repository.commit_id(commit), int(start)


def _next_page(call: Call, cursor: str) -> str:
    query = [(name, value) for name, value in call.request.query_params.multi_items() if name != "cursor"]
    # The path stays encoded as the client sent it.
    return (
        f'<{call.endpoint}{call.request.scope["path"]}?{urlencode([*query, ("cursor", cursor)])}>; rel="next"'
    )


# Refs


def list_refs(call: Call) -> dict[str, Any]:
    with call.contents(call.repo()) as repository:
        refs: dict[str, Any] = {"branches": _refs(repository, "refs/heads/"), "converts": []}
        refs["tags"] = _refs(repository, "refs/tags/")
        if call.flag("include_prs"):
            refs["pullRequests"] = [
                {**ref, "name": ref["ref"]} for ref in _refs(repository, "refs/pr/") if ref["name"].isdigit()
            ]
    return refs


def _refs(repository: Repository, prefix: str) -> list[dict[str, str]]:
    return [
        {"name": name, "ref": prefix + name, "targetCommit": commit}
        for name, commit in repository.refs(prefix).items()
    ]


def create_tag(call: Call) -> dict[str, Any]:
    repo = call.repo(write=True)
    name, message = call.text("tag"), call.text("message", "")
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        commit = repository.commit_id(call.param("revision"))
        repository.create_tag(name, commit, message, author_line(call.signed_in()))
    return {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}


def delete_tag(call: Call) -> dict[str, Any]:
    repo = call.repo(write=True)
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        repository.delete_tag(call.param("revision"))
    return {}


def create_branch(call: Call) -> dict[str, Any]:
    repo = call.repo(write=True)
    name = call.param("branch")
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        commit = repository.commit_id(call.text("startingPoint", "main"))
        repository.create_branch(name, commit)
    return {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}


def delete_branch(call: Call) -> dict[str, Any]:
    repo = call.repo(write=True)
    if call.param("branch") == "main":
        raise conflict("The branch main cannot be deleted")
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        repository.delete_ref(f"refs/heads/{call.param('branch')}")
    return {}


def squash(call: Call) -> dict[str, Any]:
    """Replace a branch's history by one commit with the same files."""
    repo = call.repo(write=True)
    message = call.text("message", "Super-squash branch")
    with call.hub.store.lock(repo), call.contents(repo) as repository:
        reference = repository.writable_ref(call.param("branch"))
        head = repository.commit_id(reference)
        commit = repository.write_commit(repository.files(head), [], author_line(call.signed_in()), message)
        repository.move_ref(reference, head, commit)
    return {"commitOid": commit}


# Files


class LargeFileResponse(FileResponse):
    """A large file, read in pieces that make few trips to a worker thread."""

    chunk_size = 1 << 20


def resolve(call: Call) -> Response:
    """A file's contents, whole or a range of them."""
    repo = call.repo()
    call.check_gate(repo)
    with call.contents(repo) as repository:
        commit = repository.commit_id(call.param("revision"))
        entry = repository.file(commit, call.param("path"))
        headers = _file_headers(commit, entry)
        if headers["ETag"] in (call.request.headers.get("if-none-match") or "").split(", "):
            return Response(status_code=304, headers=headers)
        if entry.pointer:
            return _send_large(call, repo, entry, headers)
        return _send(call, repository.read(entry.oid), headers)


def _file_headers(commit: str, entry: Entry) -> dict[str, str]:
    etag = f'"{entry.pointer.sha256 if entry.pointer else entry.oid}"'
    headers = {
        "X-Repo-Commit": commit,
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(entry.path.rpartition('/')[2], safe='')}",
        # Users' files come from the Hub's own address: no browser may run what is in them.
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    if entry.pointer:
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(entry.size)}
    return headers


def _send_large(call: Call, repo: RepoId, entry: Entry, headers: dict[str, str]) -> Response:
    assert entry.pointer is not None
    path = call.hub.store.large_files(repo).path(entry.pointer.sha256)
    if not path.is_file():
        raise Refusal(404, f"{entry.path}: its LFS object was never uploaded here", "EntryNotFound")
    return LargeFileResponse(path, headers=headers, media_type="application/octet-stream")


def _send(call: Call, data: bytes, headers: dict[str, str]) -> Response:
    media_type = "text/plain; charset=utf-8"
    if (mimetypes.guess_type(call.param("path"))[0] or "").startswith("image/"):
        media_type = "application/octet-stream"
    asked = _RANGE.fullmatch((call.request.headers.get("range") or "").replace(" ", ""))
    if_range = call.request.headers.get("if-range")
    if asked is None or asked.groups() == ("", "") or (if_range is not None and if_range != headers["ETag"]):
        return Response(data, headers=headers, media_type=media_type)
    first, last = asked.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= end:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
    return Response(data[start:end], status_code=206, headers=headers, media_type=media_type)


_REPO = "/api/{kind}/{owner}/{name}"

ROUTES = [
    Route(f"{_REPO}/tree/{{revision}}", endpoint(list_tree)),
    Route(f"{_REPO}/tree/{{revision}}/{{path:path}}", endpoint(list_tree)),
    Route(f"{_REPO}/paths-info/{{revision}}", endpoint(paths_info, "form"), methods=["POST"]),
    Route(f"{_REPO}/commits/{{revision}}", endpoint(list_commits)),
    Route(f"{_REPO}/refs", endpoint(list_refs)),
    Route(f"{_REPO}/tag/{{revision}}", endpoint(create_tag, "json"), methods=["POST"]),
    Route(f"{_REPO}/tag/{{revision}}", endpoint(delete_tag), methods=["DELETE"]),
    Route(f"{_REPO}/branch/{{branch}}", endpoint(create_branch, "json"), methods=["POST"]),
    Route(f"{_REPO}/branch/{{branch}}", endpoint(delete_branch), methods=["DELETE"]),
    Route(f"{_REPO}/super-squash/{{branch}}", endpoint(squash, "json"), methods=["POST"]),
]

FILE_ROUTES = [
    Route(f"/{prefix}{{owner}}/{{name}}/resolve/{{revision}}/{{path:path}}", endpoint(resolve))
    for prefix in PAGE_PREFIXES.values()
]
