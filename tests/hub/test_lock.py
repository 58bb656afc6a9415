"""adapterhub.lock: parsed strictly, made from a real Hub, and held to by pull and load_adapter."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub import LockError, load_adapter
from adapterhub.hub.lockfile import LOCK_NAME, LockedBase, LockedRelease, LockFile, find_lock
from adapterhub.hub.push import push
from adapterhub.hub.refs import Ref
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.release import Release

Run = Callable[..., tuple[int, str, str]]

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
VERSIONS = st.builds(lambda *n: ".".join(map(str, n)), *[st.integers(0, 99)] * 3)
REFS = st.builds(
    lambda owner, name, revision: f"{owner}/{name}{revision}",
    *[st.text("abcXYZ019", min_size=1, max_size=8)] * 2,
    st.sampled_from(["", "@v1.2.0", "@main", "@refs/pr/3"]),
)
ENTRIES = st.builds(
    LockedRelease,
    version=VERSIONS,
    tag=st.none() | VERSIONS.map("v{}".format),
    commit=HEX.map(lambda text: text[:40]),
    manifest_sha256=HEX,
    signers=st.lists(WORDS, max_size=2).map(tuple),
    base=st.none() | st.builds(LockedBase, name=WORDS, digest=HEX),
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of the data
@given(st.dictionaries(REFS, ENTRIES, max_size=4))
def test_what_is_written_is_read_again(releases: dict[str, LockedRelease]) -> None:
    lock = LockFile(releases=releases)
    data = lock.to_bytes()
    assert LockFile.from_bytes(data) == lock
    assert LockFile.from_bytes(data).to_bytes() == data
    assert list(tomllib.loads(data.decode())["releases"]) == sorted(releases)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_anything_else_is_refused_in_words(data: bytes) -> None:
    try:
        lock = LockFile.from_bytes(data)
    except LockError as err:
        said = err.what
    else:
        said = f"{LOCK_NAME}, which holds {len(lock.releases)} releases"
    assert LOCK_NAME in said


ENTRY = LockedRelease(version="1.0.0", tag="v1.0.0", commit="a" * 40, manifest_sha256="b" * 64)
SOUND = LockFile(releases={"ada/x": ENTRY}).to_bytes()


@given(st.data())
def test_a_damaged_lock_file_never_gives_another_entry_unseen(data: st.DataObject) -> None:
    """One byte changed is an error, or shows in what was read; only comments and spaces are free."""
    at = data.draw(st.integers(SOUND.index(b"schema_version"), len(SOUND) - 1))
    damaged = SOUND[:at] + bytes([data.draw(st.integers(0, 255))]) + SOUND[at + 1 :]
    try:
        found = LockFile.from_bytes(damaged)
    except LockError:
        return
    if found == LockFile(releases={"ada/x": ENTRY}):
        assert tomllib.loads(damaged.decode()) == tomllib.loads(SOUND.decode())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x" * (1024 * 1024 + 1), "is over"),
        ("releases = ", "not TOML"),
        ("schema_version = 2", "reads up to 1"),
        ("schema_version = true\n", "schema_version"),
        ("a = 1", "a: Extra inputs"),
        ('[releases."a b"]\n', "names no repository"),
        ('[releases."ada/x@v1.0.0"]\nversion = "1.0.0"\n', "Field required"),
        ('[releases."ada/x"]\nversion = "1.0"\n', "version"),
        ("[" * 100_000, "not TOML"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / LOCK_NAME
    path.write_text(content)
    with pytest.raises(LockError, match=words) as caught:
        LockFile.read(path)
    assert str(path) in caught.value.what


def test_which_entry_answers_for_a_reference() -> None:
    newer = ENTRY.model_copy(update={"version": "2.0.0", "tag": "v2.0.0", "commit": "c" * 40})
    lock = LockFile(releases={"ada/x": newer, "ada/x@v1.0.0": ENTRY, "ada/y": ENTRY})
    assert lock.find(Ref("ada/x", None)) == newer
    assert lock.find(Ref("ada/x", "v1.0.0")) == ENTRY
    assert lock.find(Ref("ada/x", "v2.0.0")) == newer
    assert lock.find(Ref("ada/x", "c" * 40)) == newer
    assert lock.find(Ref("ada/x", "v3.0.0")) is None
    assert lock.find(Ref("ada/z", None)) is None
    assert lock.known_version(Ref("ada/x", "v1.0.0")) == "1.0.0"  # pinned by itself
    assert lock.known_version(Ref("ada/x", "main")) == "2.0.0"
    assert lock.known_version(Ref("ada/z", None)) is None


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a project's inference code, where commands run."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def repo(request: pytest.FixtureRequest, hub_server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that no other test uses, on the Hub that is asked from here on."""
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", hub_server.token)
    return f"ada/lock-{sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture
def publish(repo: str, tiny_release: Path, tmp_path: Path) -> Callable[..., Path]:
    """``publish("1.2.0", task=…)`` pushes a copy of the tiny release as that version; returns its folder."""

    def run(version: str, **changes: object) -> Path:
        path = tmp_path / f"release-{version}"
        shutil.copytree(tiny_release, path)
        manifest = Manifest.read(path).model_copy(update={"version": version, **changes})
        (path / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        push(Release.open(path), repo)
        return path

    return run


def test_locked_is_exact_when_the_hub_moves_on(
    run_cli: Run, project: Path, publish, repo: str, tmp_path: Path
) -> None:
    first = publish("1.0.0")
    code, out, err = run_cli("lock", repo)
    assert (code, out.split()[:2], "new, signed by nobody you trust" in err) == (0, [repo, "1.0.0"], True)
    entry = LockFile.read(project / LOCK_NAME).releases[repo]
    base = Manifest.read(first).base
    assert base is not None
    assert entry.manifest_sha256 == Release.open(first).digest
    assert entry.base == LockedBase(name="tiny-llama", digest=base.digest)
    publish("1.1.0")
    code, out, _ = run_cli("pull", repo, "--locked", "--json")
    pulled = json.loads(out)
    assert (code, pulled["version"], pulled["commit"], pulled["tag"]) == (0, "1.0.0", entry.commit, "v1.0.0")
    assert run_cli("pull", f"{repo}@1.0.0", "--locked")[0] == 0
    code, _, err = run_cli("pull", f"{repo}@1.1.0", "--locked")
    assert (code, f"does not lock {repo}@v1.1.0" in err) == (3, True)
    code, out, err = run_cli("lock")
    assert (code, "1.0.0 became 1.1.0" in err) == (0, True)
    assert json.loads(run_cli("pull", repo, "--locked", "--json")[1])["version"] == "1.1.0"
    code, _, err = run_cli("lock")
    assert (code, "as it was" in err) == (0, True)


def test_locked_is_offline_from_a_complete_cache(
    run_cli: Run, project: Path, publish, repo: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("1.0.0")
    assert run_cli("lock", repo)[0] == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, out, err = run_cli("pull", repo, "--locked", "--json")
    assert (code, json.loads(out)["offline"], "warning: " in err) == (0, True, True)
    shutil.rmtree(next(hub_cache.glob("models--*")) / "refs")  # the cache no longer knows the tag's name
    code, out, err = run_cli("pull", repo, "--locked", "--json")
    assert (code, json.loads(out)["offline"], "whether" in err) == (0, True, True)
    shutil.rmtree(hub_cache)
    assert run_cli("pull", repo, "--locked")[0] == 5


def test_whatever_moved_is_refused(
    run_cli: Run, project: Path, publish, repo: str, hub_server, tmp_path: Path
) -> None:
    publish("1.0.0")
    assert run_cli("lock", repo)[0] == 0
    path = project / LOCK_NAME
    sound = path.read_bytes()
    entry = LockFile.from_bytes(sound).releases[repo]

    def relock(**changes: object) -> None:
        path.write_bytes(LockFile(releases={repo: entry.model_copy(update=changes)}).to_bytes())

    relock(manifest_sha256="0" * 64)
    code, _, err = run_cli("pull", repo, "--locked", "--out", tmp_path / "out")
    assert (code, "manifest digest" in err, (tmp_path / "out").exists()) == (4, True, False)
    relock(signers=("key:" + "1" * 64,))
    code, _, err = run_cli("pull", repo, "--locked")
    assert (code, "locked as signed by key:1111" in err) == (4, True)
    relock(base=LockedBase(name="tiny-llama", digest="2" * 64))
    code, _, err = run_cli("pull", repo, "--locked")
    assert (code, "names the base" in err) == (3, True)
    path.write_bytes(sound)
    publish("1.1.0")
    newer = json.loads(run_cli("pull", repo, "--json")[1])["commit"]
    hub_server.move_tag(repo, "v1.0.0", newer)
    for command in (("pull", repo, "--locked"), ("pull", f"{repo}@1.0.0", "--locked")):
        code, _, err = run_cli(*command)
        assert (code, "v1.0.0 was moved" in err) == (4, True)
    assert path.read_bytes() == sound


def test_a_version_that_went_away_is_refused(
    run_cli: Run, project: Path, publish, repo: str, hub_server
) -> None:
    publish("1.0.0")
    assert run_cli("lock", repo)[0] == 0
    HfApi(endpoint=hub_server.url, token=hub_server.token).delete_tag(repo, tag="v1.0.0")
    code, _, err = run_cli("pull", repo, "--locked")
    assert (code, f"{repo}@v1.0.0 is locked at commit" in err, "and is gone" in err) == (4, True, True)


def test_going_back_wants_to_be_asked_for(
    run_cli: Run, project: Path, publish, repo: str, hub_server, tmp_path: Path
) -> None:
    publish("1.0.0")
    publish("1.1.0")
    assert run_cli("lock", repo)[0] == 0
    out = tmp_path / "out"
    code, _, err = run_cli("pull", f"{repo}@1.0.0", "--out", out)
    assert (code, "is version 1.0.0 here" in err, "--allow-downgrade" in err) == (3, True, True)
    assert not out.exists()
    HfApi(endpoint=hub_server.url, token=hub_server.token).delete_tag(repo, tag="v1.1.0")
    before = (project / LOCK_NAME).read_bytes()
    for command in (("pull", repo), ("lock",), ("lock", f"{repo}@1.0.0")):
        assert run_cli(*command)[0] == 3
    assert (project / LOCK_NAME).read_bytes() == before
    assert run_cli("pull", f"{repo}@1.0.0", "--out", out, "--allow-downgrade")[0] == 0
    assert run_cli("lock", "--allow-downgrade")[0] == 0
    assert LockFile.read(project / LOCK_NAME).releases[repo].version == "1.0.0"
    assert run_cli("pull", repo)[0] == 0


def test_a_signer_of_then_must_have_signed_now(
    run_cli: Run, project: Path, publish, repo: str, tiny_release: Path, tmp_path: Path
) -> None:
    assert run_cli("keygen", tmp_path / "keys")[0] == 0
    assert run_cli("sign", tiny_release, "--key", tmp_path / "keys/adapterhub.key")[0] == 0
    push(Release.open(tiny_release), repo)
    assert run_cli("lock", repo)[0] == 0
    (signer,) = LockFile.read(project / LOCK_NAME).releases[repo].signers
    assert signer.startswith("key:")
    assert run_cli("pull", repo, "--locked")[0] == 0
    (tiny_release / "model.sig").unlink()
    publish("0.2.0")
    code, _, err = run_cli("lock")
    assert (code, "signed by nobody trusted here" in err) == (4, True)
    assert LockFile.read(project / LOCK_NAME).releases[repo].version == "0.1.0"


def test_load_adapter_obeys_the_lock(
    run_cli: Run, project: Path, publish, repo: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("1.0.0")
    with pytest.raises(LockError, match="there is no"):
        load_adapter(repo, base=tiny_base, locked=True)
    assert run_cli("lock", repo)[0] == 0
    publish("1.1.0", kind="dataset", base=None)  # what nobody could load
    model, _ = load_adapter(repo, base=tiny_base, locked=True)
    assert not model.training
    path = project / LOCK_NAME
    monkeypatch.chdir("/")
    load_adapter(repo, base=tiny_base, locked=path)
    load_adapter(repo, base=tiny_base, locked=str(path.parent))
    with pytest.raises(LockError, match="is a folder"):
        load_adapter(project, base=tiny_base, locked=path)
    with pytest.raises(LockError, match="does not lock ada/other"):
        load_adapter("ada/other", base=tiny_base, locked=path)
    path.write_bytes(path.read_bytes().replace(b'manifest_sha256 = "', b'manifest_sha256 = "0')[:-1])
    with pytest.raises(LockError):
        load_adapter(repo, base=tiny_base, locked=path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def test_the_lock_beside_the_program_comes_first(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    program = tmp_path / "app" / "serve.py"
    program.parent.mkdir()
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(program), raising=False)
    assert find_lock(True) == Path(LOCK_NAME)
    (program.parent / LOCK_NAME).write_text("")
    assert find_lock(True) == program.parent / LOCK_NAME
    assert find_lock("elsewhere.lock") == Path("elsewhere.lock")


def test_bad_input_at_the_command_line(
    run_cli: Run, project: Path, publish, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run_cli("lock")
    assert (code, "there is no adapterhub.lock" in err) == (3, True)
    assert run_cli("lock", "no reference")[0] == 5
    assert run_cli("pull", repo, "--locked")[0] == 3
    assert run_cli("pull", repo, "--locked", "--allow-downgrade")[0] == 2
    (project / LOCK_NAME).write_text("nonsense")
    for command in (("lock",), ("lock", repo), ("pull", repo, "--locked"), ("pull", repo)):
        code, _, err = run_cli(*command)
        assert (code, "not TOML" in err) == (3, True)
    assert (project / LOCK_NAME).read_text() == "nonsense"
    (project / LOCK_NAME).unlink()
    monkeypatch.chdir(publish("1.0.0"))
    code, _, err = run_cli("lock", repo)
    assert (code, "is a release, which a lock file would break" in err) == (3, True)
