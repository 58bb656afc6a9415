"""What a dataset is made of: files of rows, the split of each row, and what is wrong with a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from adapterhub.errors import DataError
from adapterhub.packaging.rowfiles import data_files, data_names, read_entries
from adapterhub.packaging.rows import canonical, to_messages
from adapterhub.packaging.splits import Split, split_named

_BATCH_ROWS = 1024
_BATCH_BYTES = 8 << 20
_SHOWN = 3
_FORMS = (("messages", ("messages",)), ("prompt and completion", ("prompt", "completion")))
_LAST_FORM = "instruction and output"


@dataclass(frozen=True)
class Inputs:
    """Files, and how their rows are split."""

    train: tuple[Path, ...]
    test: tuple[Path, ...]
    test_share: float = 0.0
    """Share of ``train``'s rows that go to the test split instead, chosen by what they say: equal rows go the
    same way, and a row goes the same way when others are added."""


@dataclass(frozen=True)
class InputRow:
    """One sound row."""

    content: dict[str, Any]
    """All its columns."""
    messages: tuple[dict[str, str], ...]
    said: bytes
    """The messages as canonical JSON."""
    where: str
    """Where it stands, like ``train.jsonl, line 12``."""
    size: int
    """Bytes as canonical JSON."""


def find_inputs(path: Path, test: Path | None, test_share: float) -> Inputs:
    """The files of ``path`` (a file, or a folder whose names may tell splits) and of ``test``.

    Raises DataError when there are none, when the test rows are named twice over, or for files of a split
    that is neither train nor test.
    """
    if test is not None and test_share:
        raise DataError(
            "the test rows are named twice: a file, and a share", "give one of --test and --test-share"
        )
    named = {split_named(name) for name in data_names(path)} if path.is_dir() else set()
    has_test = named & {"test", "testing"}
    if has_test and (test is not None or test_share):
        raise DataError(f"{path} has a test split of its own", "leave out --test and --test-share")
    if others := sorted(named - {"train", "training", "test", "testing", None}, key=str):
        raise DataError(
            f"{path} holds files of the {others[0]} split, and a dataset release has train and test",
            "move them elsewhere, or name the files' splits train and test",
        )
    held_out = data_files(test, "test") if test is not None else data_files(path, "test") if has_test else []
    return Inputs(tuple(data_files(path, "train")), tuple(held_out), test_share)


def read_batches(inputs: Inputs) -> Iterator[tuple[Split, list[InputRow]]]:
    """All rows, in batches of one split and bounded size: first those of the test files, then the others.

    Raises DataError that names the malformed rows by file and line, the first of them with what is wrong.
    """
    problems = _Problems()
    for split, files in (("test", inputs.test), ("train", inputs.train)):
        batches: dict[Split, list[InputRow]] = {"train": [], "test": []}
        sizes: dict[Split, int] = {"train": 0, "test": 0}
        for file in files:
            for where, content in _read_or_blame(file, problems):
                row = problems.check(content, where)
                if row is None:
                    continue
                belongs: Split = (
                    "test" if split == "test" or _is_held_out(row, inputs.test_share) else "train"
                )
                batches[belongs].append(row)
                sizes[belongs] += row.size
                if len(batches[belongs]) >= _BATCH_ROWS or sizes[belongs] >= _BATCH_BYTES:
                    yield belongs, batches[belongs]
                    batches[belongs], sizes[belongs] = [], 0
        problems.refuse()
        for belongs, batch in batches.items():
            if batch:
                yield belongs, batch


def _read_or_blame(file: Path, problems: _Problems) -> Iterator[tuple[str, Any]]:
    """The rows of a file. Raises DataError for what is no JSON, or a malformed row that came before it."""
    try:
        yield from read_entries(file)
    except DataError:
        problems.refuse()
        raise


def _is_held_out(row: InputRow, share: float) -> bool:
    if not share:
        return False
    digest = blake2b(row.said, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class _Problems:
    """Checks rows one after another, and remembers what was wrong with them."""

    def __init__(self) -> None:
        self._form: tuple[str, str] | None = None  # and where it was first seen
        self._found: list[str] = []
        self._count = 0

    def check(self, content: Any, where: str) -> InputRow | None:
        """The row, or None when it is malformed."""
        try:
            messages = to_messages(content)
            check_order(messages)
            self._check_form(content, where)
            return InputRow(content, messages, canonical(messages), where, len(canonical(content)))
        except (ValueError, TypeError) as err:  # TypeError: parquet holds more than JSON can say
            self._count += 1
            if len(self._found) < _SHOWN:
                self._found.append(f"{where}: {err}" if not self._found else where)
            return None

    def _check_form(self, content: dict[str, Any], where: str) -> None:
        form = form_of(content)
        if self._form is None:
            self._form = form, where
        if form != self._form[0]:
            raise ValueError(f"this row has {form}, and {self._form[1]} has {self._form[0]}")

    def refuse(self) -> None:
        """Raise DataError when a row was malformed."""
        if not self._count:
            return
        others = self._count - len(self._found)
        more = "".join(f"; {where}" for where in self._found[1:]) + (f" and {others} more" if others else "")
        also = f" (malformed too: {more.removeprefix('; ')})" if more else ""
        raise DataError(
            self._found[0] + also,
            "each row is an object with messages, with prompt and completion, or with instruction and "
            "output, and all rows have the same of these forms",
        )


def form_of(content: dict[str, Any]) -> str:
    """Which of the three forms a sound row has."""
    return next((name for name, keys in _FORMS if all(key in content for key in keys)), _LAST_FORM)


def check_order(messages: tuple[dict[str, str], ...]) -> None:
    """Raise ValueError unless one system message at most comes first, and user and assistant take turns."""
    turns = [message["role"] for message in messages]
    offset = 1 if turns[0] == "system" else 0
    for index, role in enumerate(turns[offset:], offset):
        expected = "user" if (index - offset) % 2 == 0 else "assistant"
        if role != expected:
            raise ValueError(
                f"messages[{index}] is the {role}'s where the {expected}'s turn is: after an optional system "
                "message, user and assistant take turns"
            )
