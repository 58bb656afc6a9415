"""What a scan found: how bad, what, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["info", "low", "medium", "high"]
SEVERITIES: tuple[Severity, ...] = ("info", "low", "medium", "high")
"""Ascending. ``high``: opening it could run code, read outside the folder, hang, or give another model than
its files say; ``load_adapter`` refuses it. ``medium``: read it before you trust it. ``low``: unusual."""

_MAX_SHOWN = 240


@dataclass(frozen=True)
class Finding:
    """One thing that a scan found."""

    severity: Severity
    rule: str
    """Its stable name, for scripts: ``pickle``, ``auto-map``, …"""
    what: str
    """One line; what came from the scanned files is printable and short."""
    where: str
    """Path inside the folder, then the key, tensor or line if there is one."""
    fix: str


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings in order of severity, then of place."""
    return tuple(sorted(findings, key=lambda it: (-SEVERITIES.index(it.severity), it.where, it.rule)))


def quote(text: object, limit: int = _MAX_SHOWN) -> str:
    """A stranger's text on one line: control and invisible characters escaped, cut at ``limit``."""
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in str(text)[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
