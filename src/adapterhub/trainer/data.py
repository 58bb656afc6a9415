"""Training and evaluation rows: read from files, brought to one form, refused by line when malformed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from adapterhub.errors import DataError
from adapterhub.packaging.rowfiles import data_files, read_entries
from adapterhub.packaging.rows import canonical, to_messages
from adapterhub.packaging.splits import Split


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
    for file in data_files(path, split):
        for where, content in read_entries(file):
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


def rows_digest(rows: Iterable[Row]) -> str:
    """sha256 over the rows' messages in order, each as compact JSON with sorted keys and a newline, UTF-8.

    Independent of the file format, the form of the rows and keys that are not trained on.
    """
    digest = sha256()
    for row in rows:
        digest.update(canonical(row.messages))
    return digest.hexdigest()
