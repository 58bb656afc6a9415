"""What a command prints as labelled lines."""

from __future__ import annotations

from collections.abc import Iterable

import click

_LABEL_WIDTH = 9


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print labels and texts; what a stranger wrote cannot move the cursor or colour the terminal."""
    for label, text in fields:
        shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
        click.echo(f"{label:<{_LABEL_WIDTH}} {shown}".rstrip())
