"""A table as values: both renderings of a card print it with one macro each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["plain", "code", "strong"]


@dataclass(frozen=True)
class Cell:
    """One cell's text; the renderer escapes it."""

    text: str
    style: Style = "plain"


@dataclass(frozen=True)
class Column:
    """A column's heading."""

    name: str
    is_number: bool = False
    """Aligned to the right."""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its heading."""

    label: str
    """What it shows, for who cannot see it."""
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def make_table(label: str, columns: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> Table:
    """A table from texts. A column whose name begins with ``#`` holds numbers."""
    heads = tuple(Column(name.removeprefix("#"), name.startswith("#")) for name in columns)
    cells = tuple(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows)
    return Table(label, heads, cells)


def code(text: str) -> Cell:
    """An identifier."""
    return Cell(text, "code")


def strong(text: str) -> Cell:
    """A figure that matters."""
    return Cell(text, "strong")
