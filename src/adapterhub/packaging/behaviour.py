"""What a difference between two releases means to who uses them: behavioural semantic versioning.

Of the next version, *major* is raised when base, chat template, tokens or task changed (prompts and parsers
made for one may not fit the other), *minor* when the weights or a dataset's rows did, *patch* when only card,
evidence or records did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal

from adapterhub.errors import VersionError
from adapterhub.packaging.manifest import BaseLock, Manifest, parse_version
from adapterhub.packaging.release import Release

Level = Literal["patch", "minor", "major"]
LEVELS: Final[tuple[Level, ...]] = ("patch", "minor", "major")

_PARTS: Final[tuple[tuple[str, Level, tuple[str, ...]], ...]] = (
    ("template", "major", ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*")),
    ("tokens", "major", (
        "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
        "spiece.model", "sentencepiece.bpe.model", "*.tiktoken",
    )),
    ("card", "patch", ("README.md", "card.html", "notes.md", "card.md.j2", ".eval_results/*")),
    ("evidence", "patch", ("evidence/*",)),
    ("licence", "patch", ("LICENSE*", "LICENCE*", "NOTICE*")),
    ("rows", "minor", ("data/*.parquet",)),
    ("weights", "minor", ("*",)),  # what nobody can tell to be harmless counts as weights do
)  # fmt: skip
_NEUTRAL: Final[Mapping[str, frozenset[str]]] = {
    "adapter_config.json": frozenset(
        {"base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}
    ),
    "tokenizer_config.json": frozenset({"is_local", "local_files_only", "name_or_path"}),
    "tokenizer.json": frozenset(),
}
"""Settings that change no answer; in these files only what is said counts, not how it is written."""
_MAX_JSON_BYTES: Final = 128 * 1024 * 1024


@dataclass(frozen=True)
class Change:
    """One difference between two releases."""

    level: Level
    """What it asks of the next version."""
    part: str
    """``kind``, ``base``, ``template``, ``tokens``, ``task``, ``weights``, ``rows``, ``evidence``, ``card``,
    ``licence`` or ``records``."""
    what: str
    """In words."""


def find_changes(old: Release, new: Release) -> tuple[Change, ...]:
    """Everything that differs, the weightiest first; empty when nothing but version, time and parent do.

    Both are taken by their manifests: the caller has checked their files. Of files that differ in bytes,
    settings in JSON are compared by what they say.
    """
    found = [*_compare_heads(old.manifest, new.manifest), *_compare_files(old, new)]
    found += _compare_records(old.manifest, new.manifest)
    return tuple(sorted(found, key=lambda change: -LEVELS.index(change.level)))


def demanded(changes: tuple[Change, ...]) -> Level | None:
    """The highest level that one of ``changes`` asks for; None without changes."""
    return max((change.level for change in changes), key=LEVELS.index, default=None)


def next_version(version: str, level: Level) -> str:
    """The version after ``version`` (``1.2.3`` or ``1.2.3-rc.1``) at ``level``; never a pre-release.

    A pre-release becomes the version that it announced, if that is raised far enough: 2.0.0-rc.1 becomes
    2.0.0 at any level, 1.2.0-rc.1 becomes 1.2.0 but 2.0.0 at ``major``. Raises VersionError.
    """
    parsed = parse_version(version)
    major, minor, patch = parsed.release
    announced = parsed.is_prerelease
    if level == "major":
        return f"{major}.0.0" if announced and minor == patch == 0 else f"{major + 1}.0.0"
    if level == "minor":
        return f"{major}.{minor}.0" if announced and patch == 0 else f"{major}.{minor + 1}.0"
    return f"{major}.{minor}.{patch if announced else patch + 1}"


def check_level(level: Level, changes: tuple[Change, ...]) -> None:
    """Raise VersionError when ``changes`` ask for more than ``level``."""
    needed = demanded(changes)
    if needed is None or LEVELS.index(level) >= LEVELS.index(needed):
        return
    reasons = [f"{change.part}: {change.what}" for change in changes if change.level == needed]
    more = f" and {len(reasons) - 2} more" if len(reasons) > 2 else ""
    raise VersionError(
        f"{level} is too little for what changed: {'; '.join(reasons[:2])}{more}",
        f"bump {needed}, or leave it to `bump auto`",
    )


def part_of(name: str) -> tuple[str, Level]:
    """What a file of a release belongs to, and what a change of it asks for."""
    return next(
        (part, level)
        for part, level, patterns in _PARTS
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def _compare_heads(old: Manifest, new: Manifest) -> Iterator[Change]:
    if old.kind != new.kind:
        yield Change("major", "kind", f"{old.kind} became {new.kind}")
    if old.task != new.task:
        yield Change("major", "task", f"{_said(old.task)} became {_said(new.task)}")
    if old.merge != new.merge:
        yield Change("minor", "weights", "merged in another way")
    yield from _compare_bases(old.base, new.base)


def _compare_bases(old: BaseLock | None, new: BaseLock | None) -> Iterator[Change]:
    if old is None or new is None:
        if old is not new:
            yield Change("major", "base", "there is one in only one of them")
        return
    if old.digest != new.digest:
        names = f"{old.name} became {new.name}" if old.name != new.name else f"other weights of {new.name}"
        yield Change("major", "base", f"{names} (digest {old.digest[:12]}… became {new.digest[:12]}…)")
    if old.config_sha256 != new.config_sha256:
        yield Change("major", "base", "its config.json changed")
    if old.tokenizer_sha256 != new.tokenizer_sha256:
        yield Change("major", "tokens", "the base's tokenizer.json changed")
    if old.chat_template_sha256 != new.chat_template_sha256:
        yield Change("major", "template", "the base's chat template changed")
    if old.quantization != new.quantization:
        yield Change("major", "base", "it is quantized in another way")
    if old.digest == new.digest and (old.name, old.revision) != (new.name, new.revision):
        here, there = (lock.name + (f"@{lock.revision[:12]}" if lock.revision else "") for lock in (old, new))
        yield Change("patch", "records", f"the same base is named {there}, no longer {here}")


def _compare_files(old: Release, new: Release) -> Iterator[Change]:
    ours, theirs = old.manifest.files, new.manifest.files
    for name in sorted(ours.keys() | theirs.keys()):
        part, level = part_of(name)
        if name not in ours:
            yield Change(level, part, f"{name} is new")
        elif name not in theirs:
            yield Change(level, part, f"{name} is gone")
        elif ours[name].sha256 != theirs[name].sha256:
            yield from _compare_contents(old.path / name, new.path / name, name, part, level)


def _compare_contents(old: Path, new: Path, name: str, part: str, level: Level) -> Iterator[Change]:
    """What two files of other bytes under one name differ in."""
    keys = _other_settings(old, new) if name in _NEUTRAL else None
    if keys is None:
        yield Change(level, part, f"{name} changed")
        return
    if "chat_template" in keys:
        yield Change("major", "template", f"{name}: chat_template changed")
    weighty = sorted(keys - {"chat_template"} - _NEUTRAL[name])
    if weighty:
        yield Change(level, part, f"{name}: {_some(weighty)} changed")
    elif not keys:
        yield Change("patch", "records", f"{name} is written differently, and says the same")
    elif "chat_template" not in keys:
        yield Change("patch", "records", f"{name}: {_some(sorted(keys))} changed, which changes no answer")


def _other_settings(old: Path, new: Path) -> set[str] | None:
    """The top-level keys whose values differ; None when they cannot be told."""
    contents = []
    for path in (old, new):
        try:
            if path.stat().st_size > _MAX_JSON_BYTES:
                return None
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(content, dict):
            return None
        contents.append(content)
    ours, theirs = contents
    missing = object()
    return {key for key in ours.keys() | theirs.keys() if ours.get(key, missing) != theirs.get(key, missing)}


def _compare_records(old: Manifest, new: Manifest) -> Iterator[Change]:
    """What was written down about a release, and decides nothing of what it does."""
    for key, words in (
        ("name", "name"), ("licence", "licence"), ("datasets", "data"), ("tools", "tools"),
        ("hardware", "machine"),
    ):  # fmt: skip
        if getattr(old, key) != getattr(new, key):
            yield Change("patch", "records", f"{words} changed")
    if _without_labels(old.recipe) != _without_labels(new.recipe):
        yield Change("patch", "records", "recipe changed")


def _without_labels(recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    return recipe and {key: value for key, value in recipe.items() if key not in ("name", "version", "task")}


def _said(text: str | None) -> str:
    return "nothing" if text is None else f"“{text}”"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
