"""The embedded Hub's wire: status and error codes, ranges, signed addresses, parts, limits, hostile input."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub.hub.server.accounts import Accounts, add_token, new_record
from adapterhub.hub.server.addresses import Signer
from adapterhub.hub.server.app import build_app
from adapterhub.hub.server.calls import Hub
from adapterhub.hub.server.limits import Limits
from adapterhub.hub.server.names import RepoId
from adapterhub.hub.server.storage import Store

LIMITS = Limits(
    json_body=64 << 10,
    commit_body=256 << 10,
    regular_file=10_000,
    multipart_over=1000,
    part=400,
    address_lifetime=60,
)
ADA, BOB, READER = "ada-token", "bob-token", "reader-token"
REPO = RepoId("model", "ada", "box")
HEADER = b'{"key": "header", "value": {"summary": "s"}}\n'


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class SmallHub:
    """A Hub in this process with small limits, and a client that sends addresses just as they are written."""

    port: int
    hub: Hub

    def send(
        self,
        method: str,
        target: str,
        body: Any = None,
        token: str | None = ADA,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        sent = {**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, target, body, sent)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def commit(
        self, *operations: tuple[str, dict], token: str | None = ADA, revision: str = "main", **header
    ) -> Answer:
        rows = [{"key": "header", "value": {"summary": "s", "description": "", **header}}]
        rows += [{"key": key, "value": value} for key, value in operations]
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        return self.send("POST", f"/api/models/ada/box/commit/{revision}", lines, token)

    def batch(self, *objects: tuple[str, int], token: str | None = ADA, **values: Any) -> Answer:
        body = {
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": [{"oid": oid, "size": size} for oid, size in objects],
            **values,
        }
        return self.send("POST", "/ada/box.git/info/lfs/objects/batch", body, token)

    def head(self) -> str:
        return self.send("GET", "/api/models/ada/box").json["sha"]

    def files(self) -> list[str]:
        return [it["rfilename"] for it in self.send("GET", "/api/models/ada/box").json["siblings"]]


def add(path: str, data: bytes = b"x") -> tuple[str, dict]:
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def target_of(href: str) -> str:
    parts = urlsplit(href)
    return f"{parts.path}?{parts.query}"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallHub]:
    root = tmp_path_factory.mktemp("small")
    accounts = Accounts(root, new_record(ADA, "ada", "write", ()))
    for token, user, role in ((BOB, "bob", "write"), (READER, "ada", "read")):
        accounts._given.append(new_record(token, user, role, ()))
    hub = Hub(Store(root), accounts, Signer(root, LIMITS.address_lifetime), LIMITS)
    server = uvicorn.Server(uvicorn.Config(build_app(hub), lifespan="off", log_level="critical"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield SmallHub(listener.getsockname()[1], hub)
    server.should_exit = True
    thread.join(20)
    listener.close()


@pytest.fixture
def hub(running: SmallHub) -> SmallHub:
    """With a fresh repository ada/box."""
    if running.hub.store.exists(REPO):
        running.send("DELETE", "/api/repos/delete", {"name": "box", "organization": "ada"})
    assert running.send("POST", "/api/repos/create", {"name": "box", "organization": "ada"}).status == 200
    return running


# Errors


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/api/models/ada/none", 404, "RepoNotFound"),
        ("/api/models/none", 404, "RepoNotFound"),
        ("/api/datasets/ada/box", 404, "RepoNotFound"),
        ("/none/resolve/main/x", 404, "RepoNotFound"),
        ("/ada/none/resolve/main/x", 404, "RepoNotFound"),
        ("/datasets/ada/none/resolve/main/x", 404, "RepoNotFound"),
        ("/api/models/ada/box/revision/v1", 404, "RevisionNotFound"),
        ("/api/models/ada/box/tree/v1", 404, "RevisionNotFound"),
        ("/api/models/ada/box/commits/refs%2Fpr%2F1", 404, "RevisionNotFound"),
        ("/ada/box/resolve/v1/x", 404, "RevisionNotFound"),
        ("/ada/box/resolve/main/x", 404, "EntryNotFound"),
        ("/ada/box/resolve/main/", 404, "EntryNotFound"),
        ("/api/models/ada/box/tree/main/x", 404, "EntryNotFound"),
        ("/api/models/ada/box/xet-write-token/main", 404, "XetNotFound"),
        ("/api/nothing", 404, None),
        ("/nothing/at/all/here", 404, None),
    ],
)
def test_every_missing_thing_has_its_code(hub: SmallHub, target: str, status: int, code: str | None) -> None:
    answer = hub.send("GET", target)
    assert (answer.status, answer.headers["X-Error-Code"]) == (status, code)
    assert answer.headers["X-Error-Message"]
    assert answer.json["error"]


def test_head_carries_the_code_too(hub: SmallHub) -> None:
    answer = hub.send("HEAD", "/ada/box/resolve/main/x")
    assert (answer.status, answer.headers["X-Error-Code"], answer.body) == (404, "EntryNotFound", b"")
    assert answer.headers["X-Repo-Commit"] == hub.head()


def test_strangers_cannot_tell_private_from_missing(hub: SmallHub) -> None:
    hub.send("PUT", "/api/models/ada/box/settings", {"visibility": "private"})
    for token, status in ((None, 401), (BOB, 404)):
        for target in (
            "/api/models/ada/{}",
            "/ada/{}/resolve/main/.gitattributes",
            "/api/models/ada/{}/refs",
        ):
            hidden, missing = (hub.send("GET", target.format(name), token=token) for name in ("box", "bux"))
            assert hidden.status == missing.status == status
            assert hidden.headers["X-Error-Code"] == missing.headers["X-Error-Code"] == "RepoNotFound"
            assert hidden.body.replace(b"box", b"bux") == missing.body
    assert hub.send("GET", "/api/models/ada/box", token=READER).json["private"] is True


@pytest.mark.parametrize(
    ("token", "status"), [(None, 401), (BOB, 403), (READER, 403), ("wrong", 401), ("", 401), ("ünï", 401)]
)
def test_only_the_owner_with_a_write_token_writes(hub: SmallHub, token: str | None, status: int) -> None:
    before = hub.head()
    sent = {"Authorization": f"Bearer {token}".encode().decode("latin-1")} if token else {}
    for method, target, body in (
        ("POST", "/api/models/ada/box/commit/main", b"{}"),
        ("POST", "/api/models/ada/box/tag/main", {"tag": "v1"}),
        ("POST", "/api/models/ada/box/branch/b", {}),
        ("POST", "/api/models/ada/box/super-squash/main", {"message": "m"}),
        ("PUT", "/api/models/ada/box/settings", {"visibility": "private"}),
        ("DELETE", "/api/repos/delete", {"name": "box", "organization": "ada"}),
        ("POST", "/api/repos/move", {"fromRepo": "ada/box", "toRepo": "ada/bax", "type": "model"}),
        ("POST", "/api/repos/create", {"name": "new", "organization": "ada"}),
    ):
        answer = hub.send(method, target, body, token=None, headers=sent)
        assert answer.status == status, (target, answer.body)
    assert hub.head() == before
    assert not hub.hub.store.exists(RepoId("model", "ada", "new"))


def test_kept_tokens_work_at_once_and_stop_when_revoked(hub: SmallHub) -> None:
    from adapterhub.hub.server.accounts import revoke_token

    root = hub.hub.store.root
    token, record = add_token(root, "carol", "write", ["ada"])
    assert token not in (root / "accounts.json").read_text()
    assert (root / "accounts.json").stat().st_mode & 0o077 == 0
    whoami = hub.send("GET", "/api/whoami-v2", token=token).json
    assert (whoami["name"], whoami["orgs"][0]["name"]) == ("carol", "ada")
    assert hub.commit(add("by-carol.txt"), token=token).status == 200
    revoke_token(root, record.id)
    assert hub.send("GET", "/api/whoami-v2", token=token).status == 401
    assert hub.commit(add("2.txt"), token=token).status == 401


# Reading


def test_ranges_of_small_and_large_files(hub: SmallHub) -> None:
    small, large = b"0123456789", os.urandom(900)
    put(hub, large)
    lfs = ("lfsFile", {"path": "large.bin", "algo": "sha256", "oid": sha256(large), "size": len(large)})
    assert hub.commit(add("small.txt", small), lfs).status == 200
    for path, data in (("small.txt", small), ("large.bin", large)):
        target = f"/ada/box/resolve/main/{path}"
        whole = hub.send("GET", target)
        assert (whole.status, whole.body, whole.headers["Accept-Ranges"]) == (200, data, "bytes")
        assert hub.send("HEAD", target).headers["Content-Length"] == str(len(data))
        for header, expected in (("bytes=2-4", data[2:5]), ("bytes=5-", data[5:]), ("bytes=-3", data[-3:])):
            part = hub.send("GET", target, headers={"Range": header})
            assert (part.status, part.body) == (206, expected)
            assert part.headers["Content-Range"].endswith(f"/{len(data)}")
            assert part.headers["Content-Length"] == str(len(expected))
        beyond = hub.send("GET", target, headers={"Range": f"bytes={len(data)}-"})
        assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{len(data)}")
        etag = whole.headers["ETag"]
        same = hub.send("GET", target, headers={"Range": "bytes=1-2", "If-Range": etag})
        assert (same.status, same.body) == (206, data[1:3])
        changed = hub.send("GET", target, headers={"Range": "bytes=1-2", "If-Range": '"other"'})
        assert (changed.status, changed.body) == (200, data)
        assert hub.send("GET", target, headers={"If-None-Match": etag}).status == 304


def test_etags_are_the_digests(hub: SmallHub) -> None:
    large = os.urandom(50)
    put(hub, large)
    hub.commit(
        add("s.txt", b"text"),
        ("lfsFile", {"path": "l.bin", "algo": "sha256", "oid": sha256(large), "size": 50}),
    )
    small = hub.send("HEAD", "/ada/box/resolve/main/s.txt")
    blob = hashlib.sha1(b"blob 4\0text").hexdigest()
    assert small.headers["ETag"] == f'"{blob}"'
    answer = hub.send("HEAD", "/ada/box/resolve/main/l.bin")
    assert answer.headers["X-Linked-ETag"] == answer.headers["ETag"] == f'"{sha256(large)}"'
    assert answer.headers["X-Linked-Size"] == "50"
    assert "X-Xet-Hash" not in answer.headers


def test_users_files_cannot_act_as_the_hubs_pages(hub: SmallHub) -> None:
    hub.commit(add("page.html", b"<script>alert(1)</script>"))
    answer = hub.send("GET", "/ada/box/resolve/main/page.html")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_pages_of_a_tree_belong_to_one_commit(hub: SmallHub) -> None:
    hub.commit(*(add(f"{name}.txt") for name in "abcdef"))
    first = hub.send("GET", "/api/models/ada/box/tree/main?limit=3")
    assert [it["path"] for it in first.json] == [".gitattributes", "a.txt", "b.txt"]
    hub.commit(*(("deletedFile", {"path": f"{name}.txt"}) for name in "abc"))
    next_page = first.headers["Link"].split(";")[0].strip("<>")
    second = hub.send("GET", target_of(next_page))
    assert [it["path"] for it in second.json] == ["c.txt", "d.txt", "e.txt"]
    last = hub.send("GET", target_of(second.headers["Link"].split(";")[0].strip("<>")))
    assert [it["path"] for it in last.json] == ["f.txt"]
    assert "Link" not in last.headers


def test_history_comes_in_pages(hub: SmallHub) -> None:
    for n in range(4):
        hub.commit(add(f"{n}.txt"), summary=f"commit {n}")
    first = hub.send("GET", "/api/models/ada/box/commits/main?limit=2")
    assert [it["title"] for it in first.json] == ["commit 3", "commit 2"]
    second = hub.send("GET", target_of(first.headers["Link"].split(";")[0].strip("<>")))
    assert [it["title"] for it in second.json] == ["commit 1", "commit 0"]


# Large files


def put(hub: SmallHub, data: bytes) -> None:
    """Upload a large file in one piece."""
    action = hub.batch((sha256(data), len(data)), transfers=["basic"]).json["objects"][0]["actions"]
    assert hub.send("PUT", target_of(action["upload"]["href"]), data, token=None).status == 200
    verified = hub.send(
        "POST", target_of(action["verify"]["href"]).rstrip("?"), {"oid": sha256(data), "size": len(data)}
    )
    assert verified.status == 200


def stored(hub: SmallHub) -> list[str]:
    return sorted(path.name for path in (hub.hub.store.path(REPO) / "lfs").rglob("*") if path.is_file())


def test_an_object_is_stored_under_its_digest_once(hub: SmallHub) -> None:
    data = os.urandom(500)
    put(hub, data)
    path = hub.hub.store.path(REPO) / "lfs" / "objects" / sha256(data)[:2] / sha256(data)[2:4] / sha256(data)
    assert path.read_bytes() == data
    assert "actions" not in hub.batch((sha256(data), 500)).json["objects"][0]
    assert hub.batch((sha256(data), 501)).json["objects"][0]["error"]["code"] == 422
    assert stored(hub) == [sha256(data)]


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"y" * 500, 422), (b"x" * 499, 400), (b"x" * 501, 413), (b"", 400)],
    ids=["other bytes", "too short", "too long", "empty"],
)
def test_wrong_bytes_are_refused_and_nothing_is_kept(hub: SmallHub, sent: bytes, status: int) -> None:
    oid = sha256(b"x" * 500)
    href = target_of(hub.batch((oid, 500)).json["objects"][0]["actions"]["upload"]["href"])
    assert hub.send("PUT", href, sent, token=None).status == status
    assert stored(hub) == []
    landed = hub.commit(("lfsFile", {"path": "w.bin", "algo": "sha256", "oid": oid, "size": 500}))
    assert landed.status == 400
    assert "not uploaded" in landed.json["error"]
    assert hub.send("PUT", href, b"x" * 500, token=None).status == 200


def test_a_broken_off_upload_leaves_nothing(hub: SmallHub) -> None:
    oid = sha256(b"x" * 900)
    href = target_of(hub.batch((oid, 900)).json["objects"][0]["actions"]["upload"]["href"])
    with socket.create_connection(("127.0.0.1", hub.port)) as raw:
        raw.sendall(
            f"PUT {href} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900\r\n\r\n".encode() + b"x" * 300
        )
        time.sleep(0.2)
    deadline = time.monotonic() + 10
    while stored(hub) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stored(hub) == []


def signed_upload(hub: SmallHub) -> tuple[bytes, str]:
    data = os.urandom(300)
    return data, target_of(hub.batch((sha256(data), 300)).json["objects"][0]["actions"]["upload"]["href"])


def with_query(target: str, **changes: str) -> str:
    path, _, query = target.partition("?")
    values = {name: value[0] for name, value in parse_qs(query).items()} | changes
    return f"{path}?{urlencode(values)}"


def test_a_signed_address_is_good_for_its_own_purpose_alone(hub: SmallHub) -> None:
    data, href = signed_upload(hub)
    other = os.urandom(300)
    path, _, query = href.partition("?")
    forged = {
        "no signature": path,
        "another object": f"{path.replace(sha256(data), sha256(other))}?{query}",
        "another repository": href.replace("/ada/box/", "/ada/bux/"),
        "another size": with_query(href, size="3000"),
        "a later end": with_query(href, expires=str(int(time.time()) + 10**6)),
        "an odd end": with_query(href, expires="soon"),
        "another signature": with_query(href, signature="0" * 64),
    }
    for how, target in forged.items():
        answer = hub.send("PUT", target, other if "object" in how else data, token=None)
        assert answer.status == 403, how
    assert hub.send("GET", href, token=None).status == 403
    assert stored(hub) == []
    assert hub.send("PUT", href, data, token=None).status == 200


def test_an_expired_address_is_refused(hub: SmallHub) -> None:
    data = b"late" * 10
    old = Signer(hub.hub.store.root, lifetime=-1)
    href = old.sign("PUT", f"/lfs/models/ada/box/{sha256(data)}", size=len(data))
    answer = hub.send("PUT", href, data, token=None)
    assert (answer.status, answer.headers["X-Error-Code"]) == (403, "AddressExpired")
    assert stored(hub) == []


def multipart(hub: SmallHub, data: bytes) -> tuple[dict[str, str], str]:
    upload = hub.batch((sha256(data), len(data))).json["objects"][0]["actions"]["upload"]
    return upload["header"], target_of(upload["href"])


def test_a_large_object_comes_in_parts(hub: SmallHub) -> None:
    data = os.urandom(1900)
    header, complete = multipart(hub, data)
    assert header["chunk_size"] == "400"
    numbers = sorted(int(key) for key in header if key.isdigit())
    assert numbers == [1, 2, 3, 4, 5]
    parts = []
    for number in reversed(numbers):
        piece = data[(number - 1) * 400 : number * 400]
        done = hub.send("PUT", target_of(header[str(number)]), piece, token=None)
        parts.insert(0, {"partNumber": number, "etag": done.headers["ETag"]})
    body = {"oid": sha256(data), "parts": parts}
    missing = hub.send("POST", complete, {**body, "parts": parts[:-1]}, token=None)
    assert missing.status == 400
    assert hub.send("POST", complete, body, token=None).status == 200
    assert hub.send("POST", complete, body, token=None).status == 200
    assert stored(hub) == [sha256(data)]


def test_parts_that_make_another_object_are_refused(hub: SmallHub) -> None:
    data = os.urandom(1200)
    header, complete = multipart(hub, data)
    parts = []
    for number in (1, 2, 3):
        done = hub.send("PUT", target_of(header[str(number)]), b"z" * 400, token=None)
        parts.append({"partNumber": number, "etag": done.headers["ETag"]})
    assert hub.send("PUT", target_of(header["1"]), b"z" * 401, token=None).status == 413
    assert hub.send("POST", complete, {"oid": sha256(data), "parts": parts}, token=None).status == 422
    assert stored(hub) == []


def test_one_repositorys_objects_do_not_serve_another(hub: SmallHub) -> None:
    """Knowing a digest is not having the bytes: no stranger reads a private file through a pointer to it."""
    data = b"private weights" * 20
    put(hub, data)
    hub.send("PUT", "/api/models/ada/box/settings", {"visibility": "private"})
    hub.send("POST", "/api/repos/create", {"name": "mine", "organization": "bob"}, BOB)
    batch = {"operation": "upload", "objects": [{"oid": sha256(data), "size": len(data)}]}
    answer = hub.send("POST", "/bob/mine.git/info/lfs/objects/batch", batch, BOB)
    assert "upload" in answer.json["objects"][0]["actions"]
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()
    )
    lines = [
        {"key": "header", "value": {"summary": "s"}},
        {"key": "file", "value": add("stolen.bin", pointer)[1]},
    ]
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    hub.send("POST", "/api/models/bob/mine/commit/main", body, BOB)
    got = hub.send("GET", "/bob/mine/resolve/main/stolen.bin", token=BOB)
    assert data not in got.body
    hub.send("DELETE", "/api/repos/delete", {"name": "mine", "organization": "bob"}, BOB)


def test_git_lfs_clients_can_download(hub: SmallHub) -> None:
    data = os.urandom(200)
    put(hub, data)
    answer = hub.batch((sha256(data), 200), (sha256(b"no"), 2), operation="download", token=None)
    here, missing = answer.json["objects"]
    assert hub.send("GET", target_of(here["actions"]["download"]["href"]), token=None).body == data
    assert missing["error"]["code"] == 404


# Hostile input


@pytest.mark.parametrize(
    "path",
    [
        "../escape.txt",
        "a/../../b",
        "/etc/passwd",
        "a//b",
        "a/./b",
        "",
        ".",
        "a/",
        ".git/config",
        "sub/.GIT/hooks/x",
        "git~1/x",
        ".g\u200cit/x",
        "a\\..\\b",
        "nul\x00byte",
        "new\nline",
        "x" * 256,
        "/".join(["x" * 200] * 6),
        "\ud800",
    ],
)
def test_paths_that_could_escape_are_refused(hub: SmallHub, path: str) -> None:
    before = hub.head()
    assert hub.commit(add(path)).status == 400
    assert hub.head() == before


@pytest.mark.parametrize(
    "target",
    [
        "/ada/box/resolve/main/..%2f..%2f..%2faccounts.json",
        "/ada/box/resolve/main/../../../../secret",
        "/ada/box/resolve/..%2f..%2fsecret/x",
        "/ada/..%2f..%2fsecret/resolve/main/x",
        "/..%2f..%2f/box/resolve/main/x",
        "/api/models/ada/..%2f..%2f..",
        "/api/models/%2e%2e/box",
        "/api/models/ada/box/tree/main/..%2f..",
        "/api/models/ada/box/revision/..%2f..%2f..%2fhub.json",
        "/api/models/ada/box/revision/refs%2fheads%2f..%2f..%2fhub.json",
        "/api/models/ada/box/discussions/..%2f..%2fhub",
        "/lfs/models/ada/box/..%2f..%2fhub.json",
        "/ada/box/resolve/main/%ff%fe",
        "/api/models/ada/box/revision/%00",
        "/api/models/ada/box/revision/%ed%a0%80",
        "//etc/passwd",
    ],
)
def test_addresses_that_climb_find_nothing(hub: SmallHub, target: str) -> None:
    answer = hub.send("GET", target)
    assert answer.status in (400, 403, 404)
    assert answer.headers["Content-Type"] == "application/json"
    assert b'"created"' not in answer.body


@pytest.mark.parametrize(
    "name", ["..", "a/b/c", "a--b", "x.git", "-x", "x" * 97, "ü", "a b", "", ".", "x\n", "CON/../x"]
)
def test_odd_repository_names_are_refused(hub: SmallHub, name: str) -> None:
    answer = hub.send("POST", "/api/repos/create", {"name": name, "organization": "ada"})
    assert answer.status in (400, 403), answer.body


@pytest.mark.parametrize(
    "name",
    [
        "a..b",
        "refs/heads/x",
        "a b",
        "a~1",
        "x.lock",
        "-x",
        "/x",
        "x/",
        "",
        "a" * 300,
        "0" * 40,
        "HEAD",
        "\ud800",
    ],
)
def test_odd_ref_names_are_refused(hub: SmallHub, name: str) -> None:
    assert hub.send("POST", "/api/models/ada/box/tag/main", {"tag": name}).status == 400
    encoded = quote(name.encode("utf-8", "surrogatepass"), safe="")
    assert hub.send("POST", f"/api/models/ada/box/branch/{encoded}", {}).status in (400, 404, 405)


def test_bodies_over_their_limit_are_refused(hub: SmallHub) -> None:
    big = b'{"content": "' + b"x" * (LIMITS.json_body + 1) + b'"}'
    assert hub.send("POST", "/api/validate-yaml", big).status == 413
    assert hub.commit(add("big.txt", b"x" * 10_001)).status == 413
    assert hub.commit(*(add(f"{n}.txt", b"x" * 9000) for n in range(30))).status == 413
    assert hub.send("GET", "/api/models/ada/box?x=" + "y" * 9000).status == 414
    assert hub.files() == [".gitattributes"]


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"\n\n",
        b"not json",
        b"[]",
        b'{"key": "file"}',
        b'{"key": "header", "value": {}}',
        b'{"key": "header", "value": {"summary": 5}}',
        b'{"key": "header", "value": {"summary": "s", "parentCommit": 1}}',
        HEADER + b'{"key": "file", "value": {"path": "a"}}',
        HEADER + b'{"key": "file", "value": {"path": "a", "content": "!", "encoding": "base64"}}',
        HEADER + b'{"key": "file", "value": {"path": "a", "content": "x", "encoding": "rot13"}}',
        HEADER + b'{"key": "lfsFile", "value": {"path": "a", "algo": "md5", "oid": "0"}}',
        HEADER + b'{"key": "lfsFile", "value": {"path": "a", "algo": "sha256", "oid": "../../x"}}',
        HEADER + b'{"key": "explode", "value": {"path": "a"}}',
        HEADER + b"[" * 50_000,
    ],
)
def test_malformed_commits_are_refused(hub: SmallHub, lines: bytes) -> None:
    before = hub.head()
    answer = hub.send("POST", "/api/models/ada/box/commit/main", lines)
    assert answer.status == 400, answer.body
    assert hub.head() == before


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_bodies = {
    "/api/repos/create": ("POST", ["name", "organization", "type", "visibility", "private"]),
    "/api/repos/move": ("POST", ["fromRepo", "toRepo", "type"]),
    "/api/validate-yaml": ("POST", ["content"]),
    "/api/models/ada/box/settings": ("PUT", ["visibility", "gated"]),
    "/api/models/ada/box/preupload/main": ("POST", ["files", "gitIgnore"]),
    "/api/models/ada/box/tag/main": ("POST", ["tag", "message"]),
    "/api/models/ada/box/branch/b": ("POST", ["startingPoint"]),
    "/api/models/ada/box/super-squash/main": ("POST", ["message"]),
    "/api/models/ada/box/discussions": ("POST", ["title", "description", "pullRequest"]),
    "/api/models/ada/box/discussions/1/merge": ("POST", ["comment"]),
    "/api/models/ada/box/discussions/1/status": ("POST", ["status", "comment"]),
    "/api/models/ada/box/user-access-request/grant": ("POST", ["user"]),
    "/api/models/ada/box/lfs-verify": ("POST", ["oid", "size"]),
    "/ada/box.git/info/lfs/objects/batch": ("POST", ["operation", "transfers", "objects", "hash_algo"]),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_body_makes_the_hub_fail(hub: SmallHub, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(sorted(_bodies)))
    method, keys = _bodies[target]
    words = st.sampled_from(["main", "model", "upload", "x", "ada/box", "ada", "private", "open", "0" * 64])
    body = data.draw(_json | st.dictionaries(st.sampled_from(keys), words | _json))
    answer = hub.send(method, target, json.dumps(body).encode())
    assert answer.status < 500, (target, body, answer.body)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH"]),
    kind=st.sampled_from(["/api/models/ada/box/", "/ada/box/resolve/", "/lfs/models/ada/box/", "/api/", "/"]),
    parts=st.lists(
        st.text(max_size=12) | st.sampled_from(["tree", "main", "commits", "revision", "tag"]), max_size=4
    ),
    query=st.dictionaries(
        st.sampled_from(["limit", "cursor", "p", "expand", "size", "expires"]), st.text(max_size=8)
    ),
)
def test_no_address_makes_the_hub_fail(
    hub: SmallHub, method: str, kind: str, parts: list[str], query: dict[str, str]
) -> None:
    encoded = "/".join(quote(part.encode("utf-8", "surrogatepass"), safe="") for part in parts)
    values = urlencode({name: value.encode("utf-8", "surrogatepass") for name, value in query.items()})
    assert hub.send(method, f"{kind}{encoded}?{values}").status < 500


def test_web_pages_of_other_sites_are_kept_out(hub: SmallHub) -> None:
    body = {"name": "evil", "organization": "ada"}
    answer = hub.send("POST", "/api/repos/create", body, headers={"Origin": "https://evil.example"})
    assert answer.status == 403
    assert not hub.hub.store.exists(RepoId("model", "ada", "evil"))
    own = {"Origin": f"http://127.0.0.1:{hub.port}"}
    assert hub.send("POST", "/api/validate-yaml", {"content": "x"}, headers=own).status == 200
