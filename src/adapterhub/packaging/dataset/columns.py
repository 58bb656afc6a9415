"""The columns of a dataset: found over all rows, held together, and told in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.errors import DataError
from adapterhub.packaging.dataset.evidence import Column
from adapterhub.packaging.dataset.inputs import InputRow

if TYPE_CHECKING:
    import pyarrow

_FIX = "give a column the same type in every row, or remove it"


class Columns:
    """Grows the schema that all rows fit, batch by batch."""

    def __init__(self) -> None:
        self._schema: pyarrow.Schema | None = None

    def add(self, rows: Sequence[InputRow]) -> None:
        """Raises DataError, with the row, for a column whose type differs from the rows before."""
        try:
            self._schema = _merge(self._schema, [row.content for row in rows])
        except (ValueError, TypeError, OverflowError):  # Arrow's own errors are the first two
            self._blame(rows)
            raise

    def finish(self) -> pyarrow.Schema:
        """The schema. Raises DataError for a column that parquet cannot hold."""

        assert self._schema is not None
        for field in self._schema:
            if _has_empty_object(field.type):
                raise DataError(
                    f"the column {field.name!r} holds an object that is always empty: parquet cannot hold it",
                    "remove it from the rows",
                )
        return self._schema

    def _blame(self, rows: Sequence[InputRow]) -> None:
        """Raise DataError for the first row that does not fit those before it."""
        for row in rows:
            try:
                self._schema = _merge(self._schema, [row.content])
            except (ValueError, TypeError, OverflowError) as err:
                name = next(
                    (key for key in row.content if not _fits(self._schema, {key: row.content[key]})),
                    "a column",
                )
                raise DataError(
                    f"{row.where}: {name!r} does not fit the rows before: {_line(err)}", _FIX
                ) from err


def describe_columns(schema: pyarrow.Schema) -> tuple[Column, ...]:
    """Name and type of each column, for people."""
    return tuple(Column(name=field.name, type=_words(field.type)) for field in schema)


def _merge(schema: pyarrow.Schema | None, rows: list[dict[str, Any]]) -> pyarrow.Schema:
    import pyarrow

    found = pyarrow.schema(list(pyarrow.array(rows).type))
    return found if schema is None else pyarrow.unify_schemas([schema, found], promote_options="permissive")


def _fits(schema: pyarrow.Schema | None, content: dict[str, Any]) -> bool:
    try:
        _merge(schema, [content])
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _has_empty_object(type_: pyarrow.DataType) -> bool:
    import pyarrow.types

    if pyarrow.types.is_struct(type_):
        return type_.num_fields == 0 or any(_has_empty_object(field.type) for field in type_)
    return pyarrow.types.is_list(type_) and _has_empty_object(type_.value_type)


def _words(type_: pyarrow.DataType) -> str:
    import pyarrow.types

    if pyarrow.types.is_struct(type_):
        return "{" + ", ".join(f"{field.name}: {_words(field.type)}" for field in type_) + "}"
    if pyarrow.types.is_list(type_):
        return f"list of {_words(type_.value_type)}"
    known = {"string": "text", "bool": "true or false", "null": "always null", "double": "number"}
    return known.get(str(type_), "integer" if pyarrow.types.is_integer(type_) else str(type_))


def _line(err: Exception) -> str:
    return str(err).splitlines()[0][:200]
