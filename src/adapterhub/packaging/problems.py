"""What pydantic found wrong with a file, in words for whoever has to mend it."""

from __future__ import annotations

from pydantic import ValidationError


def first_problem(err: ValidationError) -> tuple[str, str]:
    """Where the first thing wrong stands (dotted), and what it is, without pydantic's words before ours."""
    first = err.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the top level"
    return place, first["msg"].removeprefix("Value error, ")
