"""The base's identity."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import BaseMismatchError, ReleaseError
from adapterhub.packaging.base import base_digest, check_base, lock_base, weight_files

WEIGHTS = st.dictionaries(st.text("abc-0.", min_size=1), st.binary(min_size=32, max_size=32).map(bytes.hex))


@given(WEIGHTS)
def test_the_digest_depends_on_content_not_on_order(weights: dict[str, str]) -> None:
    assert base_digest(dict(reversed(weights.items()))) == base_digest(weights)


@given(WEIGHTS.filter(bool), st.data())
def test_the_digest_changes_with_any_file(weights: dict[str, str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(weights)))
    digest = base_digest(weights)
    assert base_digest(weights | {name: "0" * 64}) != digest or weights[name] == "0" * 64
    assert base_digest({key: value for key, value in weights.items() if key != name}) != digest
    assert base_digest(weights | {"d": "0" * 64}) != digest


def test_the_digest_is_what_the_shell_prints(tmp_path: Path) -> None:
    for name in ("model-2.safetensors", "model-1.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "config.json").write_text("{}")
    shell = "LC_ALL=C; sha256sum *.safetensors | sort -k2 | sha256sum"
    printed = subprocess.run(
        ["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert lock_base(tmp_path, name="x").digest == printed.split()[0]


def test_known_digests_are_taken_and_the_rest_is_read(tiny_base: Path) -> None:
    lock = lock_base(tiny_base, name="x", weights={"model.safetensors": "1" * 64}, chat_template="hello")
    assert lock.weights == {"model.safetensors": "1" * 64}
    assert lock.chat_template_sha256 == hashlib.sha256(b"hello").hexdigest()
    assert lock.tokenizer_sha256 == hashlib.sha256((tiny_base / "tokenizer.json").read_bytes()).hexdigest()


def touch_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def touch_config(folder: Path) -> None:
    with (folder / "config.json").open("a") as file:
        file.write("\n")


def add_weights(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [(touch_weights, r"model\.safetensors"), (touch_config, r"config\.json differs"), (add_weights, "more")],
)
def test_another_base_is_told_apart_and_named(
    tiny_base: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    lock = lock_base(tiny_base, name="owner/base", revision="a" * 40)
    check_base(lock, tiny_base)
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    change(other)
    with pytest.raises(BaseMismatchError, match=words) as caught:
        check_base(lock, other)
    assert "owner/base" in caught.value.what
    assert "a" * 40 in caught.value.fix


def test_digests_known_already_are_compared_without_reading(tiny_base: Path) -> None:
    lock = lock_base(tiny_base, name="x")
    check_base(lock, tiny_base, lock.weights)
    with pytest.raises(BaseMismatchError, match=r"model\.safetensors"):
        check_base(lock, tiny_base, {"model.safetensors": "0" * 64})


def test_pickles_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="no such folder"):
        weight_files(tmp_path / "none")
    with pytest.raises(ReleaseError, match=r"holds no \*\.safetensors"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ReleaseError, match=r"only as pickles \(pytorch_model\.bin\)"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ReleaseError, match=r"holds no config\.json"):
        lock_base(tmp_path, name="x")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# A base\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3.9\n---\n", "llama3.9"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n[not: yaml\n---\n", None),
        ("# A base\n\nlicense: mit\n\n---\n\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_what_the_bases_card_names(
    tiny_base: Path, tmp_path: Path, card: str, licence: str | None
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "README.md").write_text(card, encoding="utf-8")
    assert lock_base(base, name="owner/base").licence == licence
    assert lock_base(tiny_base, name="owner/base").licence is None
