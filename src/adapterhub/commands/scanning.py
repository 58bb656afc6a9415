"""scan."""

from __future__ import annotations

import json
from pathlib import Path

import click

from adapterhub.commands.targets import naming_folder_or_ref
from adapterhub.errors import SignatureError


@click.command("scan")
@click.argument("target", metavar="PATH|REF")
@click.option(
    "--base",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The base model's folder, to compare shapes and chat template with.",
)
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def scan_command(target: str, base: Path | None, endpoint: str | None, as_json: bool) -> None:
    """Look for what could harm who opens an adapter: any PEFT folder or repository, a release or not.

    Finds pickles, code, settings that import, broken or misleading tensors, layers that stand out, chat
    templates with hidden words or ways out, links, and files that do not belong. Opens no pickle and runs no
    code. Exits 4 when something is of severity high: `load_adapter` refuses that.
    """
    from adapterhub.packaging.scan.findings import SEVERITIES
    from adapterhub.packaging.scan.report import scan_folder

    report = scan_folder(_locate(target, endpoint), base)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        for finding in report.findings:
            click.echo(f"{finding.severity:<7} {finding.where}: {finding.what}")
            click.echo(f"        fix: {finding.fix}")
        counts = ", ".join(f"{report.count(severity)} {severity}" for severity in reversed(SEVERITIES))
        click.echo(f"found   {counts}")
    if report.count("high"):
        raise SignatureError(
            f"{target} is not safe to load: {report.count('high')} findings of severity high",
            f"first of them: {report.findings[0].fix}",
        )


def _locate(target: str, endpoint: str | None) -> Path:
    if Path(target).exists():
        return Path(target)
    from adapterhub.hub.strangers import fetch_all

    with naming_folder_or_ref(target):
        return fetch_all(target, endpoint=endpoint)
