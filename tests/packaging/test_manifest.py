"""The manifest: what is written is read back, and nothing malformed gets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapterhub.errors import ManifestError, VersionError
from adapterhub.packaging.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    BaseLock,
    DatasetLock,
    FileEntry,
    Hardware,
    Manifest,
    Merge,
    Parent,
    Quantization,
    parse_version,
)

SHA = st.binary(min_size=32, max_size=32).map(bytes.hex)
COMMIT = st.binary(min_size=20, max_size=20).map(bytes.hex)
TEXT = st.text(max_size=20)
SEMVER = st.builds(
    "{}.{}.{}{}".format,
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(0, 99),
    st.sampled_from(["", "-a.0", "-b.12", "-rc.3"]),
)
PATHS = st.lists(
    st.text("abcz09-_.", min_size=1).filter(lambda part: part.strip(".")), min_size=1, max_size=3
).map("/".join)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
QUANTIZATION = st.builds(Quantization, block_size=st.sampled_from([64, 128]))
BASE = st.builds(
    BaseLock,
    name=TEXT,
    revision=st.none() | COMMIT,
    digest=SHA,
    weights=st.dictionaries(PATHS, SHA, max_size=3),
    config_sha256=SHA,
    tokenizer_sha256=st.none() | SHA,
    chat_template_sha256=st.none() | SHA,
    quantization=st.none() | QUANTIZATION,
)
DATA = st.builds(
    DatasetLock,
    source=TEXT,
    revision=st.none() | COMMIT,
    rows=st.integers(1, 10**9),
    sha256=SHA,
    licence=TEXT,
)
FILES = st.dictionaries(
    PATHS, st.builds(FileEntry, sha256=SHA, size=st.integers(0, 2**62)), max_size=5
).filter(
    lambda files: (
        len({name.casefold() for name in files}) == len(files)
        and not files.keys() & {MANIFEST_NAME, "model.sig"}
    )
)
MANIFESTS = st.builds(
    Manifest,
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"),
    version=SEMVER,
    created=st.datetimes(timezones=st.just(UTC)),
    kind=st.sampled_from(["adapter", "merged", "quantized", "dataset"]),
    task=st.none() | TEXT,
    licence=st.none() | TEXT,
    base=st.none() | BASE,
    recipe=st.none() | st.dictionaries(TEXT, JSON, max_size=4),
    datasets=st.lists(DATA, max_size=2).map(tuple),
    parent=st.none() | st.builds(Parent, ref=TEXT, manifest_sha256=SHA),
    merge=st.none() | st.builds(Merge, onto=st.sampled_from(["original", "trained"])),
    tools=st.dictionaries(TEXT, TEXT, max_size=3),
    hardware=st.none()
    | st.builds(Hardware, memory_bytes=st.integers(1, 2**50), count=st.integers(1, 999), name=TEXT),
    files=FILES,
)

MINIMAL = {"name": "x", "version": "0.1.0", "created": "2026-01-02T03:04:05Z"}


@given(MANIFESTS)
def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data)
    assert again == manifest
    assert again.to_bytes() == data


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b'{"a": ' * 100_000)
@example(b"9" * 5000)
@example(b"NaN")
@example(b"\xff\xfe{}")
def test_anything_else_is_a_manifest_error(data: bytes) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_bytes(data)
    assert caught.value.fix


KEYS = st.sampled_from([*Manifest.model_fields, "extra"])


@given(st.dictionaries(KEYS, JSON, min_size=1, max_size=4))
def test_wrong_values_are_manifest_errors_or_valid(changes: dict[str, Any]) -> None:
    data = json.dumps(MINIMAL | changes).encode()
    try:
        manifest = Manifest.from_bytes(data)
    except ManifestError:
        return
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def set_to(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_to("schema_version", 2), "schema version 2; this adapterhub reads up to 1"),
        (set_to("unknown", 1), "unknown: Extra inputs"),
        (set_to("name", "../x"), "name: "),
        (set_to("version", "1.0"), "version: "),
        (set_to("created", "2026-01-02T03:04:05"), "must be in UTC"),
        (set_to("created", "2026-01-02T03:04:05+02:00"), "must be in UTC"),
        (set_to("kind", "trojan"), "kind: "),
        (set_to("files", {"../x": {"sha256": "0" * 64, "size": 1}}), "files"),
        (set_to("files", {"model.sig": {"sha256": "0" * 64, "size": 1}}), "cannot list itself"),
        (set_to("files", {"a": {"sha256": "0" * 63, "size": 1}}), "files.a.sha256"),
        (set_to("files", {"a": {"sha256": "0" * 64, "size": -1}}), "files.a.size"),
        (
            set_to("files", {"a": {"sha256": "0" * 64, "size": 1}, "A": {"sha256": "0" * 64, "size": 1}}),
            "one file on some systems",
        ),
        (lambda content: content.pop("name"), "name: Field required"),
    ],
)
def test_the_error_names_the_key(change: Callable[[dict[str, Any]], object], words: str) -> None:
    content: dict[str, Any] = dict(MINIMAL)
    change(content)
    with pytest.raises(ManifestError) as caught:
        Manifest.from_bytes(json.dumps(content).encode(), "here/adapterhub.json")
    assert caught.value.what.startswith("here/adapterhub.json")
    assert words in caught.value.what


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(ManifestError, match="'name' stands twice"):
        Manifest.from_bytes(b'{"name": "a", "name": "b"}')


def test_an_oversized_manifest_is_not_parsed() -> None:
    with pytest.raises(ManifestError, match="over the limit"):
        Manifest.from_bytes(b" " * (MAX_MANIFEST_BYTES + 1))


def test_reading_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such folder"):
        Manifest.read(tmp_path / "none")
    with pytest.raises(ManifestError, match="is not a release"):
        Manifest.read(tmp_path)
    manifest = Manifest(name="x", version="1.2.3", created=datetime(2026, 1, 1, tzinfo=UTC))
    (tmp_path / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    assert Manifest.read(tmp_path) == manifest


def test_versions_sort_as_semver_does() -> None:
    texts = ["v1.2.4", "1.2.3-rc.2", "1.10.0", "1.2.3", "0.9.9", "1.2.3-a.9", "1.2.3-b.1", "1.2.3-rc.10"]
    ordered = sorted(texts, key=parse_version)
    assert ordered == [
        "0.9.9",
        "1.2.3-a.9",
        "1.2.3-b.1",
        "1.2.3-rc.2",
        "1.2.3-rc.10",
        "1.2.3",
        "v1.2.4",
        "1.10.0",
    ]


@pytest.mark.parametrize(
    "text", ["", "1", "1.2", "01.2.3", "1.2.3.4", "1.2.3-dev", "1.2.3\n", "vv1.2.3", "1.2.3+x"]
)
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(VersionError, match="is not a semantic version"):
        parse_version(text)
