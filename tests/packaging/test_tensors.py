"""The safetensors header: we accept nothing that the library refuses, and read what it writes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from adapterhub.errors import ReleaseError
from adapterhub.packaging.tensors import MAX_HEADER_BYTES, encode_header, read_header, read_tensor

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
SHAPES = st.lists(st.integers(0, 5), max_size=3)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8), st.tuples(st.sampled_from([*DTYPES]), SHAPES), max_size=5
)
QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def container(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@QUICK
@given(TENSORS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_what_the_library_writes_is_read(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    path = tmp_path / "x.safetensors"
    tensors.pop("__metadata__", None)
    values = {name: torch.randn(shape).mul(9).to(DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    save_file(values, path, metadata or None)
    file = read_header(path)
    assert file.size == path.stat().st_size
    assert file.metadata == metadata
    assert {entry.name: (entry.dtype, list(entry.shape)) for entry in file.entries} == tensors
    for entry in file.entries:
        if entry.dtype in ("F32", "F16", "BF16"):
            assert torch.equal(read_tensor(file, entry), values[entry.name])
        else:
            with pytest.raises(ReleaseError, match="not a float tensor"):
                read_tensor(file, entry)


@QUICK
@given(TENSORS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_what_we_write_the_library_reads(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    path = tmp_path / "x.safetensors"
    tensors.pop("__metadata__", None)
    listed = [(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    values = [
        torch.arange(torch.Size(shape).numel()).to(DTYPES[dtype]).view(shape) for _, dtype, shape in listed
    ]
    header = encode_header(listed, metadata)
    assert len(header) % 8 == 0
    path.write_bytes(
        header + b"".join(value.reshape(-1).view(torch.uint8).numpy().tobytes() for value in values)
    )
    found = load_file(path)
    assert all(torch.equal(found[name], value) for (name, _, _), value in zip(listed, values, strict=True))
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
    assert [entry.name for entry in read_header(path).entries] == [name for name, _, _ in listed]


NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**62, 2**64, 1.5, True, None, "4"])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "", None, 3]),
        "shape": st.lists(NUMBERS, max_size=3) | st.none(),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | st.none(),
    }
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRY | st.none() | st.text(), max_size=3
)


@QUICK
@given(HEADERS | st.binary(max_size=40), st.binary(max_size=40), st.none() | st.integers(0, 2**64 - 1))
@example(b"[" * 100_000, b"", None)
@example(b'{"a":' * 20_000, b"", None)
@example({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"1234", None)
@example({"a": {"dtype": "U8", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}, b"", None)
def test_what_we_accept_the_library_accepts(
    tmp_path: Path, header: Any, data: bytes, length: int | None
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(container(header, data, length))
    try:
        file = read_header(path)
    except ReleaseError:
        return
    with safe_open(path, "pt") as found:
        assert set(found.keys()) == {entry.name for entry in file.entries}


@QUICK
@given(st.binary(max_size=60))
def test_bytes_at_random_are_refused_or_read_by_both(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        read_header(path)
    except ReleaseError:
        return
    with safe_open(path, "pt"):
        pass


def entry(begin: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


BOMBS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "length past the end": (container({}, length=1000), "too short"),
    "length of all ones": (b"\xff" * 8 + b"{}", "too short"),
    "overlapping": (container({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "'b' overlaps"),
    "same place": (container({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "overlaps"),
    "gap": (
        container({"a": entry(0, 2), "b": entry(4, 6)}, b"123456"),
        "'b' overlaps another tensor or leaves a gap",
    ),
    "gap at the start": (container({"a": entry(2, 4)}, b"1234"), "leaves a gap"),
    "past the end": (container({"a": entry(0, 9)}, b"1234"), "end at byte"),
    "trailing bytes": (container({"a": entry(0, 2)}, b"1234"), "end at byte"),
    "negative offset": (container({"a": entry(0, 4, data_offsets=[-4, 0])}, b"1234"), "malformed offsets"),
    "backwards": (container({"a": entry(0, 4, data_offsets=[4, 0])}, b"1234"), "has -4 bytes"),
    "shape too large": (container({"a": entry(0, 4, shape=[2**40])}, b"1234"), "is not what U8"),
    "negative shape": (container({"a": entry(0, 4, shape=[-2, -2])}, b"1234"), "malformed shape"),
    "unknown dtype": (container({"a": entry(0, 4, dtype="F4")}, b"1234"), "unknown dtype"),
    "extra key": (container({"a": entry(0, 4, code="x")}, b"1234"), "and nothing else"),
    "metadata of numbers": (container({"__metadata__": {"a": 1}}), "__metadata__"),
    "name twice": (container(b'{"a":1,"a":2}'), "stands twice"),
    "a list": (container([]), "not a JSON object"),
    "no UTF-8": (container(b'{"\xff":1}'), "not a sound"),
}


@pytest.mark.parametrize(("data", "words"), BOMBS.values(), ids=BOMBS)
def test_each_defect_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ReleaseError) as caught:
        read_header(path)
    assert words in caught.value.what


LET_THROUGH = ("extra key", "name twice")


@pytest.mark.parametrize("name", [name for name in BOMBS if name not in LET_THROUGH])
def test_the_library_refuses_them_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BOMBS[name][0])
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


def test_a_header_bomb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(ReleaseError, match="are allowed"):
        read_header(path)


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    file = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ReleaseError, match="ended while it was read"):
        read_tensor(file, file.entries[0])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="no such file"):
        read_header(tmp_path / "none")
