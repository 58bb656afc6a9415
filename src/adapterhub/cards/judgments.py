"""Judgments of an arena, as files hold them: the better of two answers, and scores beside a reference's."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from adapterhub.errors import DataError
from adapterhub.packaging.files import staged_folder
from adapterhub.packaging.manifest import Frozen, Sha256

ARENA = "arena.json"
PAIRWISE = "pairwise.jsonl"
RELATIVE = "relative.jsonl"

Verdict = Literal["first", "second", "tie", "unparsed"]
_VERDICTS: dict[str, Verdict] = {"1": "first", "2": "second", "3": "tie", "-1": "unparsed"}
_UNPARSED = -1.0
_PAIR_COLUMNS = ("question_id", "first", "second")
_RELATIVE_COLUMNS = ("question_id", "system", "order", "score")
_FORMS = "question_id,first,second,verdict (or v1,v2,v3), or question_id,system,order,REFERENCE,score"


class Judgment(Frozen):
    """One rater's verdict on two answers to one question."""

    question: str
    first: str
    """The system whose answer was shown first."""
    second: str
    verdict: Verdict
    """The better answer by its place; ``unparsed``: the rater's words gave none, and none is guessed."""
    rater: str
    reply: str | None = None
    """What a judge model said; None of people and of what was imported."""


class RelativeScore(Frozen):
    """One rater's scores for a system's answer and the reference's answer to the same question."""

    question: str
    system: str
    reference: str
    reference_first: bool
    """Whether the reference's answer was shown first."""
    score: float | None
    """Points of the system; None when the rater's words gave none."""
    reference_score: float | None


class Source(Frozen):
    """A file that was imported."""

    name: str
    sha256: Sha256
    rows: int


class System(Frozen):
    """Who answered."""

    name: str
    kind: Literal["release", "checkpoint", "answers"]
    sha256: Sha256
    """Of a release's manifest, of a file of answers; a checkpoint's base digest."""
    decoding: dict[str, Any] | None = None
    """How it answered; None for a file of answers."""


class Rater(Frozen):
    """Who judges."""

    name: str
    kind: Literal["model", "person"]
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of a model: where it runs, its decoding, the prompt's sha256."""


class ArenaFile(Frozen):
    """arena.json: where an arena's judgments come from."""

    schema_version: Literal[1] = 1
    sources: tuple[Source, ...] = ()
    """Files that were imported."""
    questions: Source | None = None
    """What was asked here."""
    systems: tuple[System, ...] = ()
    raters: tuple[Rater, ...] = ()


@dataclass(frozen=True)
class Arena:
    """All judgments of one folder."""

    sources: tuple[Source, ...]
    pairwise: tuple[Judgment, ...]
    relative: tuple[RelativeScore, ...]


def import_files(paths: Sequence[Path]) -> Arena:
    """Read judgments from CSV or JSONL files, told apart by their columns.

    ``question_id,first,second,verdict`` holds one rater's verdicts (1: first, 2: second, 3: tie, -1: not
    parsed), ``v1,v2,…`` in place of ``verdict`` several raters'. ``question_id,system,order,REFERENCE,score``
    holds scores beside those of the system that names the fourth column; ``order`` is ``REFERENCE_first`` or
    ``system_first``, and -1 is a score that was not parsed. Raises DataError naming file and line.
    """
    sources: list[Source] = []
    pairwise: list[Judgment] = []
    relative: list[RelativeScore] = []
    for path in paths:
        content = _read_bytes(path)
        rows = list(_rows(path, content))
        if not rows:
            raise DataError(f"{path} holds no judgments", f"write a header and rows: {_FORMS}")
        for where, row in rows:
            if set(_PAIR_COLUMNS) <= row.keys():
                pairwise += _read_pair(where, row, _rater_prefix(path, paths))
            elif set(_RELATIVE_COLUMNS) <= row.keys():
                relative.append(_read_relative(where, row))
            else:
                raise DataError(f"{where}: its columns are {', '.join(row) or 'none'}", f"use {_FORMS}")
        digest = sha256(content).hexdigest()
        sources.append(Source(name=path.name, sha256=digest, rows=len(rows)))
    return Arena(tuple(sources), tuple(pairwise), tuple(relative))


def write_arena(arena: Arena, folder: Path) -> None:
    """Write an arena as a new folder, whole or not at all. Raises ReleaseError when ``folder`` is in use."""
    with staged_folder(folder) as staging:
        content = ArenaFile(sources=arena.sources).model_dump_json(indent=2) + "\n"
        (staging / ARENA).write_text(content, encoding="utf-8")
        for name, rows in ((PAIRWISE, arena.pairwise), (RELATIVE, arena.relative)):
            if rows:
                (staging / name).write_bytes(b"".join(map(to_line, rows)))


def read_arena(folder: Path) -> Arena:
    """Read a folder that ``write_arena`` made. Raises DataError naming what is missing or malformed."""
    path = folder / ARENA
    if not path.is_file():
        raise DataError(f"{folder} is no arena: {ARENA} is missing", "make it: adapterhub arena import FILE")
    sources = read_head(folder).sources
    return Arena(
        sources, read_lines(folder / PAIRWISE, Judgment), read_lines(folder / RELATIVE, RelativeScore)
    )


def read_head(folder: Path) -> ArenaFile:
    """An arena's arena.json. Raises DataError when it is malformed."""
    path = folder / ARENA
    try:
        return ArenaFile.model_validate_json(path.read_bytes())
    except ValidationError as err:
        raise DataError(f"{path}: {err.errors()[0]['msg']}", "make the arena again") from err


RowT = TypeVar("RowT", bound=Frozen)


def to_line(row: Frozen) -> bytes:
    """A row as a line of JSONL; what has its default value is left out."""
    return (row.model_dump_json(exclude_defaults=True) + "\n").encode()


def read_lines(path: Path, model: type[RowT]) -> tuple[RowT, ...]:
    """A JSONL file's rows; none when there is no such file."""
    if not path.is_file():
        return ()
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(model.model_validate_json(line))
        except ValidationError as err:
            raise DataError(
                f"{path}, line {number}: {err.errors()[0]['msg']}",
                "remove that line, or make the arena again",
            ) from err
    return tuple(rows)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as err:
        raise DataError(f"{path} is no file", "name a CSV or JSONL file of judgments") from err


def _rows(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row with where it stands, its cells as text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError(
            f"{path} is not UTF-8 text (byte {err.start})", "save it as CSV or JSONL in UTF-8"
        ) from err
    if path.suffix == ".jsonl":
        return _jsonl_rows(path, text)
    return _csv_rows(path, text)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if len(set(names)) != len(names):
            raise DataError(f"{path}, line 1: a column is named twice", f"use {_FORMS}")
        reader.fieldnames = names
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: not as many cells as the header has", "mend that line")
            yield where, {name: cell.strip() for name, cell in row.items()}
    except csv.Error as err:
        raise DataError(f"{path}, line {reader.line_num}: {err}", "mend that line") from err


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row: Any = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # refuses half a surrogate pair
        except (ValueError, RecursionError) as err:
            raise DataError(f"{where}: not JSON", "write one JSON object a line") from err
        if not isinstance(row, dict) or not all(isinstance(v, str | int | float) for v in row.values()):
            raise DataError(f"{where}: not an object of texts and numbers", "write one JSON object a line")
        yield where, {name: str(value) for name, value in row.items()}


def _rater_prefix(path: Path, paths: Sequence[Path]) -> str:
    """What tells the raters of several files apart."""
    return f"{path.stem}/" if len(paths) > 1 else ""


def _read_pair(where: str, row: dict[str, str], prefix: str) -> Iterator[Judgment]:
    question, first, second = (row[name] for name in _PAIR_COLUMNS)
    if not (question and first and second) or first == second:
        raise DataError(f"{where}: a question and two different systems are needed", "mend that line")
    columns = ["verdict"] if "verdict" in row else [name for name in row if _is_rater_column(name)]
    if not columns:
        raise DataError(f"{where}: no column verdict, or v1, v2, v3", f"use {_FORMS}")
    for column in columns:
        verdict = _VERDICTS.get(row[column])
        if verdict is None:
            raise DataError(
                f"{where}: {column} is {row[column]!r}",
                "write 1 (first is better), 2 (second), 3 (tie) or -1 (not parsed)",
            )
        yield Judgment(
            question=question, first=first, second=second, verdict=verdict, rater=f"{prefix}{column}"
        )


def _is_rater_column(name: str) -> bool:
    return name.startswith("v") and name[1:].isdecimal()


def _read_relative(where: str, row: dict[str, str]) -> RelativeScore:
    reference, *others = [name for name in row if name not in _RELATIVE_COLUMNS] or [""]
    if not reference or others:
        raise DataError(
            f"{where}: {len(others) + 1 if reference else 'no'} columns could be the reference's",
            f"use {_FORMS}",
        )
    if row["order"] not in (f"{reference}_first", "system_first"):
        raise DataError(
            f"{where}: the order {row['order']!r} does not say which answer was shown first",
            f"write {reference}_first or system_first",
        )
    if not (row["question_id"] and row["system"]):
        raise DataError(f"{where}: a question and a system are needed", "mend that line")
    return RelativeScore(
        question=row["question_id"],
        system=row["system"],
        reference=reference,
        reference_first=row["order"] == f"{reference}_first",
        score=_points(where, "score", row["score"]),
        reference_score=_points(where, reference, row[reference]),
    )


def _points(where: str, column: str, cell: str) -> float | None:
    """Points of 0 or more; None for -1, which was not parsed."""
    try:
        points = float(cell)
    except ValueError:
        points = math.nan
    if points == _UNPARSED:
        return None
    if not math.isfinite(points) or points < 0:
        raise DataError(f"{where}: {column} is {cell!r}", "write points of 0 or more, or -1 (not parsed)")
    return points
