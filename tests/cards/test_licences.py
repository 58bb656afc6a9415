"""Licences: what is carried on, and which conflicts are named."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from adapterhub.cards.licences import find_licensing
from adapterhub.packaging.manifest import BaseLock, DatasetLock, Manifest


def release(licence: str | None, base: str | None, *data: str | None) -> Manifest:
    lock = BaseLock(name="owner/base", digest="a" * 64, weights={}, config_sha256="b" * 64, licence=base)
    rows = [
        DatasetLock(source=f"{at}.jsonl", split="train", rows=1, sha256="c" * 64, licence=name)
        for at, name in enumerate(data)
    ]
    test = DatasetLock(source="test.jsonl", split="test", rows=1, sha256="d" * 64, licence="cc-by-nc-4.0")
    return Manifest(
        name="a", version="0.1.0", created=datetime(2026, 1, 1, tzinfo=UTC), licence=licence, base=lock,
        datasets=(*rows, test),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stated", "base", "data", "licence", "is_carried"),
    [
        ("mit", "apache-2.0", "cc0-1.0", "mit", False),
        (None, "apache-2.0", "cc-by-4.0", "apache-2.0", True),
        (None, "llama3.1", "mit", "llama3.1", True),
        (None, "Apache-2.0", "cc-by-sa-4.0", "cc-by-sa-4.0", True),
        (None, "llama2", "cc-by-sa-4.0", None, False),
        (None, "apache-2.0", None, None, False),
        (None, None, "mit", None, False),
        (None, "apache-2.0", "cc-by-nd-4.0", None, False),
        (None, "somebody's own", "mit", "somebody's own", True),
    ],
)
def test_what_its_author_does_not_state_is_carried_from_base_and_data(
    stated: str | None, base: str | None, data: str | None, licence: str | None, is_carried: bool
) -> None:
    found = find_licensing(release(stated, base, data))
    assert (found.licence, found.is_carried) == (licence, is_carried)


@pytest.mark.parametrize(
    ("stated", "base", "data", "words"),
    [
        ("apache-2.0", "apache-2.0", "mit", []),
        (
            "mit",
            "apache-2.0",
            "cc-by-nc-4.0",
            ["is under cc-by-nc-4.0, which allows no commercial use"],
        ),
        ("cc-by-nc-4.0", "apache-2.0", "cc-by-nc-4.0", []),
        ("mit", "llama3.1", "mit", ["the base owner/base is under llama3.1, whose terms go with"]),
        ("llama3.1", "llama3.1", "mit", []),
        ("mit", "gpl-3.0", "cc-by-nc-nd-4.0", ["whose terms go with", "which allows no adapted works"]),
        (None, "llama2", "cc-by-sa-4.0", ["llama2", "cc-by-sa-4.0"]),
        ("mit", None, None, []),
    ],
)
def test_conflicts_are_named(
    stated: str | None, base: str | None, data: str | None, words: list[str]
) -> None:
    conflicts = find_licensing(release(stated, base, data)).conflicts
    assert len(conflicts) == len(words)
    for conflict, said in zip(conflicts, words, strict=True):
        assert said in conflict
