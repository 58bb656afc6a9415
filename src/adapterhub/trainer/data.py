"""Training and evaluation rows: read from files, brought to one form, refused by line when malformed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from adapterhub.errors import DataError
from adapterhub.packaging.splits import DATA_SUFFIXES, Split, belongs, is_data, split_named

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One conversation that ends with the assistant."""

    messages: tuple[dict[str, str], ...]
    """``{"role": …, "content": …}`` in order."""
    where: str
    """Where it stands, like ``train.jsonl, line 12``."""


def read_rows(source: Path | str, split: Split = "train") -> list[Row]:
    """Every row of a JSONL, JSON or parquet file, or of a folder of them.

    Three forms are known, row by row: chat ``messages``; ``prompt`` and ``completion``; Alpaca's
    ``instruction``, ``input`` (may be empty or absent) and ``output``. Other keys are ignored. Of a folder
    whose paths name splits (``train.jsonl``, ``test/part-0.parquet``) only those of ``split`` are read.

    Raises DataError for a missing or empty source, or naming the first malformed row by file and line.
    """
    path = Path(source)
    rows: list[Row] = []
    problems: list[str] = []
    for file in _files(path, split):
        for where, content in _entries(file):
            try:
                rows.append(Row(to_messages(content), where))
            except ValueError as err:
                problems.append(f"{where}: {err}")
    if problems:
        more = f" ({len(problems) - 1} more malformed rows follow)" if len(problems) > 1 else ""
        raise DataError(
            problems[0] + more,
            "each row is an object with messages, with prompt and completion, or with instruction and output",
        )
    if not rows:
        raise DataError(f"{path} holds no rows", "name a file with at least one row")
    return rows


def to_messages(content: Any) -> tuple[dict[str, str], ...]:
    """One row's messages, whatever form it has. Raises ValueError saying what is wrong with it."""
    if not isinstance(content, dict):
        raise ValueError(f"an object is needed, this is {_kind(content)}")
    if "messages" in content:
        return _check_messages(content["messages"])
    if "prompt" in content and "completion" in content:
        prompt, completion = content["prompt"], content["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):  # the conversational form of the pair
            return _check_messages(prompt + completion)
        return _pair(_text(content, "prompt"), _text(content, "completion"))
    if "instruction" in content and "output" in content:
        extra = _text(content, "input") if content.get("input") is not None else ""
        prompt = _text(content, "instruction") + (f"\n\n{extra}" if extra.strip() else "")
        return _pair(prompt, _text(content, "output"))
    found = ", ".join(list(content)[:6]) or "no keys"
    raise ValueError(f"neither messages, nor prompt and completion, nor instruction and output ({found})")


def rows_digest(rows: Iterable[Row]) -> str:
    """sha256 over the rows' messages in order, each as compact JSON with sorted keys and a newline, UTF-8.

    Independent of the file format, the form of the rows and keys that are not trained on.
    """
    digest = sha256()
    for row in rows:
        line = json.dumps(row.messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _files(path: Path, split: Split) -> list[Path]:
    if path.is_file():
        if path.suffix not in DATA_SUFFIXES:
            raise DataError(
                f"{path}: not a data file by its name", f"name a file that ends in {', '.join(DATA_SUFFIXES)}"
            )
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder", "check the path of the data")
    names = sorted(name for name in _walk(path) if is_data(PurePosixPath(name)))
    if not names:
        raise DataError(
            f"{path} holds no data files", f"put files that end in {', '.join(DATA_SUFFIXES)} there"
        )
    if not any(split_named(name) for name in names):
        return [path / name for name in names]
    ours = [path / name for name in names if belongs(name, split)]
    if not ours:
        raise DataError(
            f"{path} holds no files of the {split} split", f"name the file, or call it {split}.jsonl"
        )
    return ours


def _walk(folder: Path) -> Iterator[str]:
    """The relative paths of all files below; a folder that cannot be read is an error, not an empty one."""

    def refuse(err: OSError) -> None:
        raise err

    for root, _folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        yield from ((Path(root) / name).relative_to(folder).as_posix() for name in names)


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, content) of each row of one file; blank lines of JSONL are skipped."""
    if file.suffix == ".parquet":
        yield from _parquet_entries(file)
        return
    if file.suffix == ".json":
        yield from _json_entries(file)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file.name}, line {number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as err:
                raise DataError(
                    f"{where}: not valid JSON: {_first_line(err)}", "mend or remove that line"
                ) from err


def _json_entries(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as err:
        fix = "mend it, or name it .jsonl if it holds a row a line"
        raise DataError(f"{file}: not valid JSON: {_first_line(err)}", fix) from err
    if not isinstance(content, list):
        raise DataError(
            f"{file}: a list of rows is needed, this is {_kind(content)}",
            "name it .jsonl if it holds a row a line",
        )
    yield from ((f"{file.name}, row {number}", row) for number, row in enumerate(content, 1))


def _parquet_entries(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name}, row {number}", row
    except pyarrow.ArrowException as err:
        raise DataError(f"{file}: not a parquet file: {_first_line(err)}", "write it again") from err


def _check_messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"messages[{index}] must be an object with a role and a content of text")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"messages[{index}].role is {role!r}; known are {', '.join(ROLES)}")
        _check_unicode(message["content"], f"messages[{index}].content")
        if role == "assistant" and not message["content"].strip():
            raise ValueError(f"messages[{index}]: the assistant says nothing")
        checked.append({"role": role, "content": message["content"]})
    if checked[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {checked[-1]['role']}'s; the assistant must answer")
    if all(message["role"] == "assistant" for message in checked):
        raise ValueError("there is no prompt before the assistant's answer")
    return tuple(checked)


def _pair(prompt: str, completion: str) -> tuple[dict[str, str], ...]:
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if not completion.strip():
        raise ValueError("the answer is empty")
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})


def _text(content: dict[str, Any], key: str) -> str:
    value = content[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, this is {_kind(value)}")
    _check_unicode(value, key)
    return value


def _check_unicode(text: str, key: str) -> None:
    """JSON can spell half a surrogate pair, which is no character and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise ValueError(f"{key} holds half a surrogate pair at character {err.start + 1}") from err


def _kind(value: Any) -> str:
    names: Sequence[tuple[type, str]] = (
        (dict, "an object"),
        (list, "a list"),
        (str, "text"),
        (bool, "true or false"),
    )
    return next(
        (name for kind, name in names if isinstance(value, kind)), "null" if value is None else "a number"
    )


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0][:200] if str(err) else type(err).__name__
