"""Files of rows: which ones of a folder, and their contents one after another, each with where it stands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

from adapterhub.errors import DataError
from adapterhub.packaging.rows import kind
from adapterhub.packaging.splits import DATA_SUFFIXES, Split, belongs, is_data, split_named

MAX_LINE_BYTES: Final = 64 << 20
"""Of one row in a JSONL file."""
MAX_JSON_BYTES: Final = 1 << 30
"""Of a .json file, which is read as a whole."""
_LOOKED_AT: Final = 4096  # bytes of a file that tell whether it is text
_OTHER_TEXT = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


def data_files(path: Path, split: Split) -> list[Path]:
    """The files that hold the rows of ``split``: ``path`` itself, or those of a folder.

    Of a folder whose paths name splits (``train.jsonl``, ``test/part-0.parquet``) only those of ``split``.
    Raises DataError when there are none.
    """
    if path.is_file():
        if path.suffix not in DATA_SUFFIXES:
            raise DataError(
                f"{path}: not a data file by its name", f"name a file that ends in {', '.join(DATA_SUFFIXES)}"
            )
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder", "check the path of the data")
    names = data_names(path)
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


def data_names(folder: Path) -> list[str]:
    """The sorted relative paths of all files with rows below ``folder``, links followed.

    Raises OSError for a folder that cannot be read.
    """

    def refuse(err: OSError) -> None:
        raise err

    found = []
    for root, _folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in names]
    return sorted(name for name in found if is_data(PurePosixPath(name)))


def read_entries(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, content) of each row of one file, in order; blank lines of JSONL are skipped.

    JSONL and parquet are read a piece at a time. Raises DataError, by line where there are lines, for what is
    no JSON, no UTF-8, or too long to be a row.
    """
    if file.suffix == ".parquet":
        yield from _parquet_entries(file)
    elif file.suffix == ".json":
        yield from _json_entries(file)
    else:
        yield from _line_entries(file)


def _line_entries(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        start = lines.peek(_LOOKED_AT)[:_LOOKED_AT]
        number = 0
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{file.name}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB",
                    "put one row on each line, with a line feed after it",
                )
            if not line.strip():
                continue
            try:
                yield where, _parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as err:
                if number == 1:
                    _check_text(start, where)
                raise DataError(
                    f"{where}: not valid JSON: {_first_line(err)}", "mend or remove that line"
                ) from err


def _check_text(start: bytes, where: str) -> None:
    """Raise DataError when the first bytes of a file show that it is no UTF-8 text at all."""
    for mark, encoding in _OTHER_TEXT:
        if start.startswith(mark):
            raise DataError(f"{where}: this is {encoding} text", "save the file as UTF-8")
    if b"\0" in start:
        raise DataError(f"{where}: this is a binary file", "name a file of JSON rows, one a line")


def _json_entries(file: Path) -> Iterator[tuple[str, Any]]:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise DataError(
            f"{file} has over {MAX_JSON_BYTES >> 20} MiB, and a .json file must be read as a whole",
            "write it as .jsonl, a row a line",
        )
    try:
        content = _parse(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as err:
        fix = "mend it, or name it .jsonl if it holds a row a line"
        raise DataError(f"{file}: not valid JSON: {_first_line(err)}", fix) from err
    if not isinstance(content, list):
        raise DataError(
            f"{file}: a list of rows is needed, this is {kind(content)}",
            "name it .jsonl if it holds a row a line",
        )
    yield from ((f"{file.name}, row {number}", row) for number, row in enumerate(content, 1))


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _parquet_entries(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name}, row {number}", row
    except pyarrow.ArrowException as err:
        raise DataError(f"{file}: not a parquet file: {_first_line(err)}", "write it again") from err


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0][:200] if str(err) else type(err).__name__
