"""The git-lfs batch API, and the signed addresses that the bytes of large files are sent to and read from."""

from __future__ import annotations

import contextlib
import secrets
from math import ceil
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from adapterhub.hub.server.api_contents import LargeFileResponse
from adapterhub.hub.server.calls import Call, endpoint, streaming_endpoint
from adapterhub.hub.server.lfs import LargeFiles, check_object, is_digest, join_parts, receive
from adapterhub.hub.server.names import KINDS, PAGE_PREFIXES, RepoId
from adapterhub.hub.server.refusals import Refusal, bad_request

_MEDIA_TYPE = "application/vnd.git-lfs+json"
_MAX_SIZE = 1 << 44


def batch(call: Call) -> Response:
    """Where to send (or fetch) each object; an object that is here already needs no sending."""
    repo = call.repo()
    operation, objects = call.text("operation"), call.document().get("objects")
    if operation not in ("upload", "download"):
        raise bad_request("operation is upload or download")
    if not isinstance(objects, list) or not all(_is_object(item) for item in objects):
        raise bad_request("Each of objects has an oid (a sha256) and a size in bytes")
    if call.document().get("hash_algo", "sha256") != "sha256":
        raise bad_request("Objects are named by sha256")
    if operation == "upload":
        call.contributor()
        call.hub.store.large_files(repo).drop_abandoned(call.hub.limits.address_lifetime)
        transfers = call.document().get("transfers") or ["basic"]
        answers = [
            _upload(call, repo, item["oid"], item["size"], "multipart" in transfers) for item in objects
        ]
    else:
        call.check_gate(repo)
        answers = [_download(call, repo, item["oid"], item["size"]) for item in objects]
    return JSONResponse(
        {"transfer": "basic", "objects": answers, "hash_algo": "sha256"}, media_type=_MEDIA_TYPE
    )


def _is_object(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and is_digest(item.get("oid"))
        and type(item.get("size")) is int
        and 0 <= item["size"] <= _MAX_SIZE
    )


def _upload(call: Call, repo: RepoId, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    stored = call.hub.store.large_files(repo).size(oid)
    if stored is not None:
        if stored != size:
            return {
                "oid": oid,
                "size": size,
                "error": {"code": 422, "message": f"this object has {stored} bytes"},
            }
        return answer
    base = f"/lfs/{KINDS[repo.type]}/{repo.full_name}/{oid}"
    action: dict[str, Any]
    if in_parts and size > call.hub.limits.multipart_over:
        upload, part = secrets.token_hex(8), call.hub.limits.part
        header = {"chunk_size": str(part)}
        for number in range(1, ceil(size / part) + 1):
            part_size = min(part, size - (number - 1) * part)
            header[str(number)] = _signed(
                call, "PUT", f"{base}/parts/{number}", size=part_size, upload=upload
            )
        action = {
            "href": _signed(call, "POST", f"{base}/complete", size=size, upload=upload),
            "header": header,
        }
    else:
        action = {"href": _signed(call, "PUT", base, size=size)}
    verify = f"{call.endpoint}/api/{KINDS[repo.type]}/{repo.full_name}/lfs-verify"
    return {**answer, "actions": {"upload": action, "verify": {"href": verify}}}


def _download(call: Call, repo: RepoId, oid: str, size: int) -> dict[str, Any]:
    if call.hub.store.large_files(repo).size(oid) is None:
        return {
            "oid": oid,
            "size": size,
            "error": {"code": 404, "message": "this object is not in this repository"},
        }
    href = _signed(call, "GET", f"/lfs/{KINDS[repo.type]}/{repo.full_name}/{oid}")
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"download": {"href": href}}}


def _signed(call: Call, method: str, path: str, **values: str | int) -> str:
    return call.endpoint + call.hub.signer.sign(method, path, **values)


def verify(call: Call) -> dict[str, Any]:
    """Whether an object arrived whole."""
    repo = call.repo()
    oid, size = call.text("oid"), call.document().get("size")
    stored = call.hub.store.large_files(repo).size(oid) if is_digest(oid) else None
    if stored is None or stored != size:
        raise Refusal(404, f"Object {oid} with {size} bytes is not in {repo.full_name}", "ObjectNotFound")
    return {}


async def put_object(call: Call) -> Response:
    """The bytes of one large file."""
    files, oid, size = _open_signed(call)
    if files.size(oid) is None:
        unchecked = await run_in_threadpool(files.new_path, oid)
        found_size, found_oid = await receive(call.request.stream(), unchecked, size)
        try:
            check_object(oid, size, found_oid, found_size)
            await run_in_threadpool(files.keep, unchecked, oid)
        finally:
            with contextlib.suppress(FileNotFoundError):
                unchecked.unlink()
    return Response(headers={"ETag": f'"{oid}"'})


async def put_part(call: Call) -> Response:
    """The bytes of one part of a large file."""
    files, oid, size = _open_signed(call)
    upload, number = call.query("upload") or "", int(call.param("part"))
    part = files.part_path(oid, upload, number)
    unchecked = part.with_suffix(f".{secrets.token_hex(6)}")
    found_size, digest = await receive(call.request.stream(), unchecked, size)
    if found_size != size:
        unchecked.unlink()
        raise bad_request(f"Part {number} of {oid}: {size} bytes were announced, {found_size} were sent")
    unchecked.replace(part)
    part.with_suffix(".etag").write_text(digest)
    return Response(headers={"ETag": f'"{digest}"'})


def complete(call: Call) -> dict[str, Any]:
    """All parts are there: make the object of them. Saying so twice is no error."""
    files, oid, size = _open_signed(call)
    sent = call.document().get("parts")
    parts = [part for part in sent if isinstance(part, dict)] if isinstance(sent, list) else []
    numbers = [part.get("partNumber") for part in parts]
    if not numbers or numbers != list(range(1, len(parts) + 1)):
        raise bad_request("parts is a list of all parts, each with partNumber and etag, in order")
    with call.hub.store.lock_object(_signed_repo(call), oid):
        if files.size(oid) is None:
            join_parts(
                files, oid, size, call.query("upload") or "", [str(part.get("etag")) for part in parts]
            )
    return {"oid": oid, "size": size}


def get_object(call: Call) -> Response:
    """The bytes of one large file, for git-lfs."""
    files, oid, _ = _open_signed(call)
    if files.size(oid) is None:
        raise Refusal(404, f"Object {oid} is not in this repository", "ObjectNotFound")
    return LargeFileResponse(
        files.path(oid), headers={"ETag": f'"{oid}"'}, media_type="application/octet-stream"
    )


def _signed_repo(call: Call) -> RepoId:
    repo = call.named_repo()
    if not call.hub.store.exists(repo):
        raise Refusal(404, f"Repository {repo.full_name} is gone", "RepoNotFound")
    return repo


def _open_signed(call: Call) -> tuple[LargeFiles, str, int]:
    """Check the address -> the repository's large files, the object's id, and how many bytes may come."""
    method = "GET" if call.request.method == "HEAD" else call.request.method
    call.hub.signer.check(method, call.request.scope["path"], dict(call.request.query_params))
    return call.hub.store.large_files(_signed_repo(call)), call.param("oid"), int(call.query("size") or 0)


_BATCH = "{owner}/{name}.git/info/lfs/objects/batch"
_OBJECT = "/lfs/{kind}/{owner}/{name}/{oid}"

ROUTES = [
    Route("/api/{kind}/{owner}/{name}/lfs-verify", endpoint(verify, "json"), methods=["POST"]),
    Route(_OBJECT, streaming_endpoint(put_object), methods=["PUT"]),
    Route(_OBJECT, endpoint(get_object)),
    Route(f"{_OBJECT}/parts/{{part}}", streaming_endpoint(put_part), methods=["PUT"]),
    Route(f"{_OBJECT}/complete", endpoint(complete, "json"), methods=["POST"]),
    *(
        Route(f"/{prefix}{_BATCH}", endpoint(batch, "json"), methods=["POST"])
        for prefix in PAGE_PREFIXES.values()
    ),
]
