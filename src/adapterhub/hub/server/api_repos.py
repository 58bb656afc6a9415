"""Repositories as a whole: create, find, describe, change, move, delete; and who is asking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from adapterhub.hub.server.calls import Call, author_line, endpoint
from adapterhub.hub.server.card import check_card, describe_card, read_card
from adapterhub.hub.server.names import KINDS, RepoId, check_repo_name, is_name
from adapterhub.hub.server.refusals import Refusal, bad_request, repo_not_found
from adapterhub.hub.server.repository import Repository


def whoami(call: Call) -> dict[str, Any]:
    account = call.signed_in()
    return {
        "type": "user",
        "id": account.user,
        "name": account.user,
        "fullname": account.user,
        "isPro": False,
        "orgs": [
            {"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": account.role}
            for org in account.orgs
        ],
        "auth": {"type": "access_token", "accessToken": {"displayName": "token", "role": account.role}},
    }


def create_repo(call: Call) -> Any:
    repo = _repo_in_body(call)
    account = call.check_may_write(repo.owner)
    try:
        call.hub.store.create(repo, private=_is_private(call.document()), author=author_line(account))
    except Refusal as refusal:
        if refusal.status != 409:
            raise
        # The client reads the address even when exist_ok made it swallow the conflict.
        answer = refusal.response()
        return type(answer)(
            {"error": refusal.message, **_address(call, repo)},
            status_code=409,
            headers={name: answer.headers[name] for name in ("x-error-code", "x-error-message")},
        )
    return _address(call, repo)


def delete_repo(call: Call) -> dict[str, Any]:
    repo = _repo_in_body(call)
    if not call.readable(repo):
        raise repo_not_found(repo.full_name, signed_in=call.account is not None)
    call.check_may_write(repo.owner)
    call.hub.store.delete(repo)
    return {}


def move_repo(call: Call) -> dict[str, Any]:
    type_ = call.text("type", "model")
    source, target = (_split(call.text(key), type_) for key in ("fromRepo", "toRepo"))
    if not call.readable(source):
        raise repo_not_found(source.full_name, signed_in=call.account is not None)
    call.check_may_write(source.owner)
    call.check_may_write(target.owner)
    call.hub.store.move(source, target)
    return _address(call, target)


def change_settings(call: Call) -> dict[str, Any]:
    repo = call.repo(write=True)
    document = call.document()
    store = call.hub.store
    with store.lock(repo):
        settings = store.settings(repo)
        if "visibility" in document or "private" in document:
            settings = replace(settings, private=_is_private(document))
        if "gated" in document:
            if document["gated"] not in (False, "auto", "manual"):
                raise bad_request("gated is false, 'auto' or 'manual'")
            settings = replace(settings, gated=document["gated"])
        store.save_settings(repo, settings)
    return {"private": settings.private, "gated": settings.gated}


def grant_access(call: Call) -> dict[str, Any]:
    repo = call.repo(write=True)
    user = call.text("user")
    if not is_name(user):
        raise bad_request(f"Invalid user name {user}")
    store = call.hub.store
    with store.lock(repo):
        settings = store.settings(repo)
        if not settings.gated:
            raise bad_request(f"{repo.full_name} is not gated: everybody who can see it can read it")
        store.save_settings(repo, replace(settings, granted=tuple(sorted({*settings.granted, user}))))
    return {"user": user}


def check_access(call: Call) -> dict[str, Any]:
    repo = call.repo()
    call.check_gate(repo)
    return {}


def check_write_access(call: Call) -> dict[str, Any]:
    call.repo(write=True)
    return {}


def repo_info(call: Call) -> dict[str, Any]:
    repo = call.repo()
    with call.contents(repo) as repository:
        revision = call.param("revision") if "revision" in call.request.path_params else "main"
        return _describe(call, repo, repository, repository.commit_id(revision), blobs=call.flag("blobs"))


def list_repos(call: Call) -> list[dict[str, Any]]:
    """What the caller may see, newest first, filtered by ``author``, ``search``, ``filter`` (tags) and
    ``pipeline_tag``."""
    types = {kind: type_ for type_, kind in KINDS.items()}
    if call.param("kind") not in types:
        raise Refusal(404, f"{call.request.url.path} is not a part of this Hub's API")
    author, search = call.query("author"), (call.query("search") or "").lower()
    wanted = {tag for value in call.request.query_params.getlist("filter") for tag in value.split(",") if tag}
    task = call.query("pipeline_tag")
    found = []
    for repo in call.hub.store.repos(types[call.param("kind")]):
        if (
            (author and repo.owner != author)
            or search not in repo.full_name.lower()
            or not call.readable(repo)
        ):
            continue
        generation = call.hub.store.generation(repo)
        try:
            with call.contents(repo) as repository:
                head = repository.commit_id("refs/heads/main")
                description = _describe(call, repo, repository, head, blobs=False)
        except Exception:
            if not call.hub.store.went_away(repo, generation):
                raise
            continue
        if wanted <= set(description["tags"]) and task in (None, description.get("pipeline_tag")):
            found.append(description)
    found.sort(key=lambda description: str(description["lastModified"]), reverse=True)
    limit = call.query("limit") or ""
    return found[: int(limit)] if limit.isdigit() else found


def validate_yaml(call: Call) -> Response:
    """What is wrong with a card; the client reads the lists, and refuses the card when the status is 400."""
    errors, warnings = check_card(call.text("content"))
    answer = {
        "errors": [{"message": text} for text in errors],
        "warnings": [{"message": text} for text in warnings],
    }
    return JSONResponse(answer, status_code=400 if errors else 200)


def _describe(
    call: Call, repo: RepoId, repository: Repository, commit: str, *, blobs: bool
) -> dict[str, Any]:
    settings = call.hub.store.settings(repo)
    files = repository.files(commit)
    card = read_card(repository.read(files["README.md"][1].decode())) if "README.md" in files else {}
    siblings = []
    for path, (_, oid) in files.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            entry = repository.entry(path, oid)
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.pointer:
                sibling["lfs"] = {
                    "size": entry.size,
                    "sha256": entry.pointer.sha256,
                    "pointerSize": entry.pointer_size,
                }
        siblings.append(sibling)
    return {
        "_id": f"{repo.type}:{repo.full_name}",
        "id": repo.full_name,
        "modelId": repo.full_name,
        "author": repo.owner,
        "sha": commit,
        "lastModified": repository.commit_date(commit),
        "createdAt": settings.created,
        "private": settings.private,
        "gated": settings.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
        **describe_card(card, files, repo.type),
    }


def _address(call: Call, repo: RepoId) -> dict[str, str]:
    return {"url": f"{call.endpoint}/{repo.address}", "name": repo.full_name, "type": repo.type}


def _repo_in_body(call: Call) -> RepoId:
    document = call.document()
    name = call.text("name")
    owner = document.get("organization") or call.signed_in().user
    if "/" in name:
        owner, _, name = name.partition("/")
    return _checked(call.text("type", "model"), owner, name)


def _split(full_name: str, type_: str) -> RepoId:
    owner, _, name = full_name.partition("/")
    return _checked(type_, owner, name)


def _checked(type_: str, owner: object, name: str) -> RepoId:
    if type_ not in KINDS or not isinstance(owner, str):
        raise bad_request(f"A repository is one of {', '.join(KINDS)}")
    check_repo_name(owner, name)
    return RepoId(type_, owner, name)


def _is_private(document: dict[str, Any]) -> bool:
    """From ``visibility``, or from the ``private`` that older clients send."""
    visibility = document.get("visibility", "private" if document.get("private") else "public")
    if visibility not in ("public", "private"):
        raise bad_request("visibility is 'public' or 'private'")
    return bool(visibility == "private")


_REPO = "/api/{kind}/{owner}/{name}"

ROUTES = [
    Route("/api/whoami-v2", endpoint(whoami)),
    Route("/api/validate-yaml", endpoint(validate_yaml, "json"), methods=["POST"]),
    Route("/api/repos/create", endpoint(create_repo, "json"), methods=["POST"]),
    Route("/api/repos/delete", endpoint(delete_repo, "json"), methods=["DELETE"]),
    Route("/api/repos/move", endpoint(move_repo, "json"), methods=["POST"]),
    Route(f"{_REPO}/settings", endpoint(change_settings, "json"), methods=["PUT"]),
    Route(f"{_REPO}/auth-check", endpoint(check_access)),
    Route(f"{_REPO}/auth-check/write", endpoint(check_write_access)),
    Route(f"{_REPO}/user-access-request/grant", endpoint(grant_access, "json"), methods=["POST"]),
    Route(f"{_REPO}/revision/{{revision}}", endpoint(repo_info)),
    Route(_REPO, endpoint(repo_info)),
    Route("/api/{kind}", endpoint(list_repos)),
]
