"""A folder scanned: every room's findings in one report, and the refusal that loading takes from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import ReleaseError
from adapterhub.packaging.checkpoint import Checkpoint, open_checkpoint
from adapterhub.packaging.scan.findings import SEVERITIES, Finding, Severity, worst_first
from adapterhub.packaging.scan.folder import is_plain_file, list_entries, scan_entries, scan_listing
from adapterhub.packaging.scan.settings import scan_settings
from adapterhub.packaging.scan.template import TEMPLATE_NAME, scan_template, templates_in
from adapterhub.packaging.scan.weights import scan_weights


@dataclass(frozen=True)
class ScanReport:
    """What a scan found in a folder."""

    path: Path
    findings: tuple[Finding, ...]
    """Worst first."""

    @property
    def worst(self) -> Severity | None:
        """The highest severity; None when nothing was found."""
        return self.findings[0].severity if self.findings else None

    def count(self, severity: Severity) -> int:
        """How many findings are of ``severity``."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "path": str(self.path),
            "worst": self.worst,
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [asdict(finding) for finding in self.findings],
        }


def scan_folder(folder: Path, base: Path | None = None) -> ScanReport:
    """Look for whatever could harm who opens a release, a plain PEFT adapter or a checkpoint.

    No pickle is opened, no code imported; a chat template is rendered in a sandbox with limits. ``base``, the
    base model's folder, adds what only a comparison shows: factors that do not fit its weights, a chat
    template that differs from its own. Raises ReleaseError when there is no such folder, or ``base`` is no
    checkpoint.
    """
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.is_file() else "no such folder"
        raise ReleaseError(f"{folder}: {kind}", "check the path, or write owner/name for the Hub")
    checkpoint = open_checkpoint(base) if base is not None else None
    return ScanReport(folder, worst_first(_scan(folder, checkpoint, contents=True)))


def check_loadable(folder: Path) -> None:
    """Raise ReleaseError for the first finding of severity high: it is not loaded.

    File contents are not compared with the manifest again: who opened the release did.
    """
    for finding in _scan(folder, None, contents=False):
        if finding.severity == "high":
            where = "" if finding.where in finding.what else f"{folder / finding.where}: "
            raise ReleaseError(
                f"{where}{finding.what}", f"{finding.fix}; `adapterhub scan {folder}` says more"
            )


def _scan(folder: Path, base: Checkpoint | None, *, contents: bool) -> Iterator[Finding]:
    entries = list_entries(folder)
    yield from scan_entries(folder, entries)
    yield from scan_listing(folder, entries, contents=contents)
    names = [name for name in entries if is_plain_file(folder, name)]
    yield from scan_settings(folder, names)
    yield from scan_weights(folder, names, base)
    yield from _scan_templates(folder, names, base.folder if base is not None else None)


def _scan_templates(folder: Path, names: list[str], base: Path | None) -> Iterator[Finding]:
    found = templates_in(folder, names)
    known = None
    if base is not None:
        of_base = templates_in(base, [path.name for path in base.iterdir() if path.is_file()])
        known = of_base.get(TEMPLATE_NAME) or of_base.get("tokenizer_config.json: chat_template")
    for where, text in found.items():
        yield from scan_template(text, where, known)
    in_settings = found.get("tokenizer_config.json: chat_template")
    if in_settings is not None and found.get(TEMPLATE_NAME, in_settings) != in_settings:
        what = f"{TEMPLATE_NAME} is another one: which is used depends on transformers' version"
        yield Finding(
            "medium", "template-twice", what, "tokenizer_config.json: chat_template", "keep one of the two"
        )
