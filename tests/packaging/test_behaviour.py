"""Behavioural versions: what a change asks for, and that no bump is ever less than that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import VersionError
from adapterhub.packaging.behaviour import (
    LEVELS,
    Change,
    check_level,
    demanded,
    find_changes,
    next_version,
    part_of,
)
from adapterhub.packaging.manifest import BaseLock, Manifest, Quantization, parse_version
from adapterhub.packaging.release import Release

NUMBERS = st.integers(0, 30)
VERSIONS = st.builds(
    lambda numbers, end: ".".join(map(str, numbers)) + end,
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    st.sampled_from(["", "", "-a.0", "-b.2", "-rc.1"]),
)
CHANGES = st.lists(
    st.builds(Change, st.sampled_from(LEVELS), st.just("weights"), st.just("changed")), max_size=4
).map(tuple)


@given(VERSIONS)
def test_each_level_goes_up_and_none_goes_further_than_a_higher_one(version: str) -> None:
    patch, minor, major = (parse_version(next_version(version, level)) for level in LEVELS)
    assert parse_version(version) < patch <= minor <= major
    assert not any(found.is_prerelease for found in (patch, minor, major))
    assert major.release[1:] == (0, 0)
    assert minor.release[2] == 0


@given(VERSIONS.filter(lambda version: "-" not in version))
def test_each_level_raises_its_own_number_by_one(version: str) -> None:
    major, minor, patch = (int(part) for part in version.split("."))
    assert next_version(version, "major") == f"{major + 1}.0.0"
    assert next_version(version, "minor") == f"{major}.{minor + 1}.0"
    assert next_version(version, "patch") == f"{major}.{minor}.{patch + 1}"


@given(CHANGES, st.sampled_from(LEVELS))
def test_a_level_is_refused_exactly_when_a_change_asks_for_more(
    changes: tuple[Change, ...], level: str
) -> None:
    too_little = any(LEVELS.index(change.level) > LEVELS.index(level) for change in changes)
    if too_little:
        with pytest.raises(VersionError, match="too little"):
            check_level(level, changes)
    else:
        check_level(level, changes)
    assert (demanded(changes) is None) == (not changes)


@pytest.mark.parametrize(
    ("before", "level", "after"),
    [("2.0.0-rc.1", "major", "2.0.0"), ("1.2.0-rc.1", "minor", "1.2.0"), ("1.2.0-rc.1", "major", "2.0.0"),
     ("1.2.3-rc.1", "minor", "1.3.0"), ("1.2.3-a.0", "patch", "1.2.3"), ("0.9.9", "major", "1.0.0")],
)  # fmt: skip
def test_a_pre_release_becomes_what_it_announced(before: str, level, after: str) -> None:
    assert next_version(before, level) == after


@pytest.mark.parametrize(
    ("name", "part"),
    [("chat_template.jinja", "template"), ("tokenizer.json", "tokens"), ("vocab.json", "tokens"),
     ("adapter_model.safetensors", "weights"), ("config.json", "weights"),
     ("evidence/scores.json", "evidence"),
     ("README.md", "card"), ("notes.md", "card"), (".eval_results/adapterhub.yaml", "card"),
     ("docs/README.md", "weights"), ("LICENSE", "licence"), ("odd.bin", "weights"),
     ("data/train-00000-of-00001.parquet", "rows")],
)  # fmt: skip
def test_what_a_file_belongs_to(name: str, part: str) -> None:
    assert part_of(name)[0] == part


def base(**changes: object) -> BaseLock:
    lock = BaseLock(
        name="owner/base",
        revision="a" * 40,
        digest="1" * 64,
        weights={"model.safetensors": "2" * 64},
        config_sha256="3" * 64,
        tokenizer_sha256="4" * 64,
        chat_template_sha256="5" * 64,
        quantization=Quantization(),
    )
    return lock.model_copy(update=changes)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Release]:
    """``make("new", files={…}, task=…)`` -> a release with those files beside a few standard ones."""

    def run(name: str, files: dict[str, bytes | None] | None = None, **keys: object) -> Release:
        from adapterhub.packaging.release import new_release

        standard: dict[str, bytes | None] = {
            "adapter_model.safetensors": b"weights",
            "adapter_config.json": b'{"r": 4, "peft_version": "0.20"}',
            "tokenizer_config.json": b'{"eos_token": "</s>", "is_local": true}',
            "chat_template.jinja": b"{{ messages }}",
            "README.md": b"# card",
        }
        draft = Manifest(
            **{
                "name": "x",
                "version": "1.0.0",
                "created": datetime(2026, 1, 2, tzinfo=UTC),
                "base": base(),
                "task": "Does this.",
                **keys,
            }
        )
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        with new_release(tmp_path / name, draft) as staging:
            for path, data in (standard | (files or {})).items():
                if data is not None:
                    (staging / path).parent.mkdir(exist_ok=True)
                    (staging / path).write_bytes(data)
        return Release.open(tmp_path / name)

    return run


@pytest.mark.parametrize(
    ("files", "keys", "level", "part"),
    [
        ({}, {"version": "9.9.9", "created": datetime(2027, 1, 2, tzinfo=UTC)}, None, None),
        ({"README.md": b"# other"}, {}, "patch", "card"),
        ({"evidence/scores.json": b"{}"}, {}, "patch", "evidence"),
        ({}, {"licence": "mit"}, "patch", "records"),
        ({}, {"recipe": {"training": {"seed": 1}}}, "patch", "records"),
        ({"adapter_config.json": b'{"peft_version": "0.21", "r": 4}'}, {}, "patch", "records"),
        ({}, {"base": base(name="mirror/base", revision=None)}, "patch", "records"),
        ({"adapter_model.safetensors": b"others"}, {}, "minor", "weights"),
        ({"adapter_config.json": b'{"r": 8}'}, {}, "minor", "weights"),
        ({"adapter_config.json": b"not json"}, {}, "minor", "weights"),
        ({"whatever.dat": b""}, {}, "minor", "weights"),
        ({}, {"task": "Does that."}, "major", "task"),
        ({}, {"kind": "merged"}, "major", "kind"),
        ({"chat_template.jinja": b"{{ messages }} "}, {}, "major", "template"),
        ({"chat_template.jinja": None}, {}, "major", "template"),
        ({"tokenizer_config.json": b'{"eos_token": "<e>", "is_local": true}'}, {}, "major", "tokens"),
        ({"tokenizer_config.json": b'{"eos_token": "</s>", "chat_template": "x"}'}, {}, "major", "template"),
        ({}, {"base": base(digest="9" * 64)}, "major", "base"),
        ({}, {"base": base(config_sha256="9" * 64)}, "major", "base"),
        ({}, {"base": base(quantization=None)}, "major", "base"),
        ({}, {"base": base(tokenizer_sha256=None)}, "major", "tokens"),
        ({}, {"base": base(chat_template_sha256="9" * 64)}, "major", "template"),
        ({}, {"base": None}, "major", "base"),
    ],
)
def test_what_a_change_asks_for(make, files, keys, level: str | None, part: str | None) -> None:
    changes = find_changes(make("old"), make("new", files, **keys))
    assert demanded(changes) == level
    assert [change.part for change in changes[:1]] == ([part] if part else [])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (b'{"peft_version": "0.99", "r": 4}', "adapter_config.json: peft_version changed, which changes no"),
        (b'{\n"r":4, "peft_version": "0.20"}', "is written differently, and says the same"),
    ],
)
def test_what_is_neutral_is_told_as_what_it_is(make, settings: bytes, words: str) -> None:
    old = make("old", {"adapter_config.json": b'{"r": 4, "peft_version": "0.20"}'})
    (change,) = find_changes(old, make("new", {"adapter_config.json": settings}))
    assert words in change.what
