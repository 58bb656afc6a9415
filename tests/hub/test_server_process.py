"""The embedded Hub as a process: starting, stopping, tokens, many writers at once, being killed."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError


@pytest.fixture(autouse=True)
def _plain_lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def cli(*args: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adapterhub", "hub", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def request(url: str, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    """One request -> (status, body); ``body`` is sent as JSON unless it is bytes."""
    host = url.removeprefix("http://")
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        connection.request(method, path, sent, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


# Starting and stopping


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_stops_without_a_word(
    start_hub, tmp_path: Path, stop: signal.Signals
) -> None:
    with start_hub(tmp_path / "root", stderr=subprocess.PIPE) as server:
        # The first line is a promise: the very next connection is answered.
        assert request(server.url, "GET", "/api/models") == (200, b"[]")
        server.process.send_signal(stop)
        out, err = server.process.communicate(timeout=20)
        assert (server.process.returncode, out) == (0, "")
        assert "Traceback" not in err


@pytest.mark.slow
def test_it_stops_though_a_client_holds_a_connection_open(start_hub, tmp_path: Path) -> None:
    with start_hub(tmp_path / "root") as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as idle:
            idle.sendall(
                b"POST /api/validate-yaml HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n{"
            )
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=20) == 0


def test_without_tokens_anybody_on_this_machine_writes(start_hub, tmp_path: Path) -> None:
    with start_hub(tmp_path / "root", user="", stderr=subprocess.PIPE) as server:
        api = HfApi(endpoint=server.url, token="whatever")
        assert api.whoami()["name"] == "local"
        assert api.create_repo("thing").repo_id == "local/thing"
        assert api.create_repo("some-team/thing", private=True).repo_id == "some-team/thing"
        anonymous = HfApi(endpoint=server.url, token=False)
        anonymous.upload_file(repo_id="some-team/thing", path_or_fileobj=b"x", path_in_repo="x.txt")
        assert anonymous.file_exists("some-team/thing", "x.txt")
        # A page of another site can point its own name at this machine; that name is then the Host.
        status, _ = request(server.url, "GET", "/api/models/some-team/thing", Host="evil.example:80")
        assert status == 403
        server.process.send_signal(signal.SIGTERM)
        assert "everybody on this machine" in server.process.communicate(timeout=20)[1]


def test_an_open_hub_stays_on_loopback(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "example.com"):
        done = cli("serve", tmp_path / "root", "--host", host, "--port", "0")
        assert done.returncode == 5
        assert done.stdout == ""
        assert "without tokens" in done.stderr
        assert "fix: give --user and --token" in done.stderr


@pytest.mark.slow
def test_kept_tokens_close_the_hub_for_good(start_hub, tmp_path: Path) -> None:
    root = tmp_path / "root"
    added = cli("token", "add", root, "--user", "bob", "--org", "team")
    token, token_id = added.stdout.strip(), added.stderr.split()[1]
    with start_hub(root, user="") as server:
        api = HfApi(endpoint=server.url, token=token)
        assert api.create_repo("team/thing").repo_id == "team/thing"
        assert request(server.url, "POST", "/api/repos/create", {"name": "x"})[0] == 401
        assert json.loads(cli("token", "list", root, "--json").stdout)[0]["user"] == "bob"
        assert cli("token", "revoke", root, token_id).returncode == 0
        with pytest.raises(HfHubHTTPError):
            api.create_repo("team/other")
        assert request(server.url, "POST", "/api/repos/create", {"name": "x"})[0] == 401


@pytest.mark.slow
def test_usage_errors(tmp_path: Path) -> None:
    assert "belong together" in cli("serve", tmp_path, "--user", "ada").stderr
    assert "belong together" in cli("serve", tmp_path, "--token", "t").stderr
    assert "blanks" in cli("serve", tmp_path, "--user", "ada", "--token", "a b").stderr
    bad_user = cli("serve", tmp_path, "--user", "../x", "--token", "t")
    assert (bad_user.returncode, "not a user name" in bad_user.stderr) == (5, True)
    assert cli("token", "list", tmp_path).stderr == f"{tmp_path} keeps no tokens\n"
    no_such = cli("token", "revoke", tmp_path, "00000000")
    assert (no_such.returncode, "no token with the id" in no_such.stderr) == (5, True)
    assert cli("token", "add", tmp_path, "--user", "api").returncode == 5
    (tmp_path / "accounts.json").write_text("{")
    damaged = cli("serve", tmp_path, "--port", "0")
    assert (damaged.returncode, "cannot be read" in damaged.stderr) == (5, True)


@pytest.mark.slow
def test_a_taken_port_and_a_root_in_use_are_said(start_hub, tmp_path: Path) -> None:
    with start_hub(tmp_path / "root") as server:
        port = server.url.rpartition(":")[2]
        taken = cli("serve", tmp_path / "other", "--port", port)
        assert (taken.returncode, taken.stdout) == (1, "")
        assert "choose another --port" in taken.stderr
        twice = cli("serve", tmp_path / "root", "--port", "0")
        assert (twice.returncode, twice.stdout) == (5, "")
        assert "served by another process" in twice.stderr


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "dulwich"])
def test_a_missing_extra_is_named(tmp_path: Path, missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from adapterhub.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "hub", "serve", str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5
    assert f"needs {missing}" in done.stderr
    assert "fix: pip install 'adapterhub[serve]'" in done.stderr
    assert not (tmp_path / "root").exists()


def test_help_needs_none_of_it() -> None:
    program = (
        "import sys; from adapterhub.cli import main; main(['hub', 'serve', '--help'])\n"
        "heavy = {'starlette', 'uvicorn', 'dulwich', 'torch', 'pydantic', 'huggingface_hub'}\n"
        "print(sorted(set(sys.modules) & heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


# What is on the disk


def test_git_reads_the_repository(hub_server, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    api.create_repo("ada/for-git")
    weights = os.urandom(2000)
    many = [
        CommitOperationAdd(f"many/{n}.txt", b"%d" % n) for n in range(150)
    ]  # more than go in loose objects
    api.create_commit(
        "ada/for-git",
        [CommitOperationAdd("w.safetensors", weights), CommitOperationAdd("big [1] x", weights), *many],
        commit_message="title",
        commit_description="body",
    )
    api.create_tag("ada/for-git", tag="v1.0.0", tag_message="the first")
    bare = hub_server.root / "models" / "ada" / "for-git.git"

    def git(*args: object, cwd: Path = bare) -> str:
        done = subprocess.run(["git", *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    git("fsck", "--full", "--strict")
    git("clone", "-q", bare, tmp_path / "clone")
    assert git("log", "-1", "--format=%s/%b/%an", cwd=tmp_path / "clone").strip() == "title/body/ada"
    assert git("tag", "-n", cwd=tmp_path / "clone").split() == ["v1.0.0", "the", "first"]
    digest = hashlib.sha256(weights).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 2000\n"
    assert (tmp_path / "clone" / "w.safetensors").read_text() == pointer
    assert (tmp_path / "clone" / "many" / "149.txt").read_text() == "149"
    filters = git("check-attr", "filter", "w.safetensors", "big [1] x", "many/1.txt", cwd=tmp_path / "clone")
    assert [line.rpartition(": ")[2] for line in filters.splitlines()] == ["lfs", "lfs", "unspecified"]
    assert (bare / "lfs" / "objects" / digest[:2] / digest[2:4] / digest).read_bytes() == weights


# Many writers


def test_concurrent_commits_each_land_or_are_refused(hub_server) -> None:
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    api.create_repo("ada/busy")
    base = api.model_info("ada/busy").sha
    outcomes: list[int] = []

    def push(n: int) -> None:
        parent = base if n % 2 else None
        try:
            api.create_commit(
                "ada/busy",
                [CommitOperationAdd(f"{n}.txt", b"same"), CommitOperationAdd("w.bin", b"\0%d" % (n % 3))],
                commit_message=f"commit {n}",
                parent_commit=parent,
            )
            outcomes.append(200)
        except HfHubHTTPError as err:
            outcomes.append(err.response.status_code)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(push, range(36)))
    assert set(outcomes) <= {200, 409, 412}
    landed = outcomes.count(200)
    assert landed >= 18  # those without a parent always land
    assert outcomes.count(412) >= 17  # of those on one parent, at most one does
    commits = api.list_repo_commits("ada/busy")
    assert len(commits) == 1 + landed
    titles = {it.title.removeprefix("commit ") for it in commits} - {"initial commit"}
    assert {
        it.removesuffix(".txt") for it in api.list_repo_files("ada/busy") if it.endswith(".txt")
    } == titles


@pytest.mark.slow
def test_concurrent_tags_creates_and_deletes_never_fail_inside(hub_server) -> None:
    seen: list[tuple[str, int]] = []
    auth = {"Authorization": f"Bearer {hub_server.token}"}

    def work(n: int) -> None:
        rng = random.Random(n)
        for _ in range(12):
            name = f"flux{rng.randrange(2)}"
            method, path, body = rng.choice(
                [
                    ("POST", "/api/repos/create", {"name": name}),
                    ("DELETE", "/api/repos/delete", {"name": name}),
                    (
                        "POST",
                        "/api/repos/move",
                        {"fromRepo": f"ada/{name}", "toRepo": "ada/flux9", "type": "model"},
                    ),
                    ("POST", f"/api/models/ada/{name}/tag/main", {"tag": "v1"}),
                    ("DELETE", f"/api/models/ada/{name}/tag/v1", None),
                    ("GET", f"/api/models/ada/{name}", None),
                    ("GET", f"/api/models/ada/{name}/tree/main?recursive=1&expand=1", None),
                    ("GET", "/api/models?author=ada", None),
                    ("POST", f"/api/models/ada/{name}/discussions", {"title": "t", "pullRequest": True}),
                ]
            )
            seen.append((path, request(hub_server.url, method, path, body, **auth)[0]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 96
    assert {status for _, status in seen} <= {200, 404, 409}, [it for it in seen if it[1] >= 500]


# Being killed


def push(url: str, token: str, n: int) -> None:
    """One release as a client sends it, without a client's retries: large file, four small ones, tag."""
    auth = {"Authorization": f"Bearer {token}"}
    weights = b"\0weights %d" % n * 5000
    oid = hashlib.sha256(weights).hexdigest()
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": len(weights)}]}
    _, answer = request(url, "POST", "/ada/hit.git/info/lfs/objects/batch", batch, **auth)
    actions = json.loads(answer)["objects"][0].get("actions")
    if actions:
        status, _ = request(url, "PUT", actions["upload"]["href"].removeprefix(url), weights)
        assert status == 200
    lines = [("header", {"summary": f"n={n}"})]
    lines += [
        ("file", {"path": f"f{k}.txt", "content": f"{k} of {n}", "encoding": "utf-8"}) for k in range(4)
    ]
    lines += [("lfsFile", {"path": "w.safetensors", "algo": "sha256", "oid": oid, "size": len(weights)})]
    body = b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in lines)
    assert request(url, "POST", "/api/models/ada/hit/commit/main", body, **auth)[0] == 200
    assert request(url, "POST", "/api/models/ada/hit/tag/main", {"tag": f"v{n}"}, **auth)[0] == 200


def push_until_killed(url: str, token: str, attempted: list[int], landed: list[int]) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        while True:
            attempted.append(attempted[-1] + 1)
            push(url, token, attempted[-1])
            landed.append(attempted[-1])


def check_whole(url: str, revision: str) -> int:
    """Every file of the revision carries one commit's number -> that number."""
    texts = [request(url, "GET", f"/ada/hit/resolve/{revision}/f{k}.txt")[1].decode() for k in range(4)]
    numbers = {int(text.split(" of ")[1]) for text in texts}
    assert len(numbers) == 1
    number = numbers.pop()
    status, weights = request(url, "GET", f"/ada/hit/resolve/{revision}/w.safetensors")
    assert (status, weights) == (200, b"\0weights %d" % number * 5000)
    return number


def kill_in_a_loop(start_hub, root: Path, rounds: int) -> None:
    rng = random.Random(7)
    attempted = [1]
    with start_hub(root) as server:
        HfApi(endpoint=server.url, token=server.token).create_repo("ada/hit")
        push(server.url, server.token, 1)
    for _ in range(rounds):
        landed: list[int] = [attempted[-1]]
        with start_hub(root) as server:
            args = (server.url, server.token, attempted, landed)
            writer = threading.Thread(target=push_until_killed, args=args)
            writer.start()
            time.sleep(rng.uniform(0.05, 0.3))
            server.process.kill()
            writer.join(60)
        with start_hub(root) as server:
            number = check_whole(server.url, "main")
            assert landed[-1] <= number <= attempted[-1]
            tags = HfApi(endpoint=server.url, token=server.token).list_repo_refs("ada/hit").tags
            assert {f"v{n}" for n in landed} <= {it.name for it in tags}
            for tag in tags:
                assert tag.name == f"v{check_whole(server.url, tag.name)}"
            # And it takes the next commit: no lock of the killed process is in the way.
            attempted.append(attempted[-1] + 1)
            push(server.url, server.token, attempted[-1])
            assert check_whole(server.url, "main") == attempted[-1]
    bare = root / "models" / "ada" / "hit.git"
    assert (
        subprocess.run(["git", "fsck", "--full"], cwd=bare, capture_output=True, timeout=60).returncode == 0
    )
    assert list((bare / "lfs" / "incomplete").glob("*")) == []
    assert list(bare.rglob("*.lock")) == []


@pytest.mark.slow
def test_a_killed_hub_has_each_commit_whole_or_not_at_all(start_hub, tmp_path: Path) -> None:
    kill_in_a_loop(start_hub, tmp_path / "root", rounds=2)


@pytest.mark.slow
def test_a_hub_killed_again_and_again(start_hub, tmp_path: Path) -> None:
    kill_in_a_loop(start_hub, tmp_path / "root", rounds=25)


@pytest.mark.slow
def test_locks_that_a_killed_process_left_are_cleared(start_hub, tmp_path: Path) -> None:
    root = tmp_path / "root"
    with start_hub(root) as server:
        HfApi(endpoint=server.url, token=server.token).create_repo("ada/stuck")
    bare = root / "models" / "ada" / "stuck.git"
    oid = hashlib.sha1(b"blob 3\0new").hexdigest()
    (bare / "objects" / oid[:2]).mkdir(exist_ok=True)
    for leftover in ("refs/heads/main.lock", f"objects/{oid[:2]}/{oid[2:]}.lock", "HEAD.lock"):
        (bare / leftover).write_bytes(b"half")
    (bare / "lfs" / "incomplete").mkdir(parents=True)
    (bare / "lfs" / "incomplete" / "half").write_bytes(b"half")
    (root / "tmp" / "half").mkdir()
    with start_hub(root) as server:
        api = HfApi(endpoint=server.url, token=server.token)
        api.upload_file(repo_id="ada/stuck", path_or_fileobj=b"new", path_in_repo="new.txt")
        assert api.file_exists("ada/stuck", "new.txt")
        assert not (bare / "lfs" / "incomplete" / "half").exists()
        assert not (root / "tmp" / "half").exists()
    assert list(bare.rglob("*.lock")) == []


# Memory


@pytest.mark.slow
def test_a_large_file_passes_through_in_bounded_memory(start_hub, tmp_path: Path) -> None:
    size = 400 << 20
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    with start_hub(tmp_path / "root") as server:
        api = HfApi(endpoint=server.url, token=server.token)
        api.create_repo("ada/large")
        with path.open("rb") as file:
            api.upload_file(repo_id="ada/large", path_or_fileobj=file, path_in_repo="large.bin")
        got = api.hf_hub_download("ada/large", "large.bin", cache_dir=tmp_path / "cache")
        assert Path(got).stat().st_size == size
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        peak = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
        assert peak < 160 << 20
