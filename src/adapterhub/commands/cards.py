"""card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.commands.targets import open_checked, refuse_cached

if TYPE_CHECKING:
    from adapterhub.packaging.release import Release


@click.command("card")
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; fail when the card does not match the evidence.")
@click.option(
    "--since",
    metavar="DIR|REF",
    help="An earlier version: what changed since then is recorded as evidence, and the card says it.",
)
@click.option("--endpoint", metavar="URL", help="The Hub to ask for it, instead of $HF_ENDPOINT.")
def card_command(release: Path, check: bool, since: str | None, endpoint: str | None) -> None:
    """Make README.md and card.html of the folder RELEASE from its manifest and evidence."""
    from adapterhub.cards.card import read_card
    from adapterhub.cards.rendering import check_files, render_files
    from adapterhub.packaging.release import Release

    if check and since is not None:
        raise click.UsageError("--check writes nothing, and --since writes evidence")
    opened = Release.open(release)
    if since is not None:
        refuse_cached(release)
        opened = _record_changes(opened, since, endpoint)
    files = render_files(read_card(opened))
    if check:
        check_files(opened, files)
        click.echo(f"the card of {release} matches its evidence")
        return
    refuse_cached(release)
    opened.with_files(files)
    for name in files:
        click.echo(release / name)


def _record_changes(release: Release, since: str, endpoint: str | None) -> Release:
    """Hold the release against an earlier one, and write down what changed."""
    from adapterhub.cards.changes import since_earlier
    from adapterhub.cards.words import take_words
    from adapterhub.packaging.changes import CHANGES
    from adapterhub.packaging.comparison import compare
    from adapterhub.packaging.evidence import to_json

    release = take_words(release)
    release.check_files()
    earlier = open_checked(since, endpoint)
    manifest = earlier.manifest
    name = manifest.name if Path(since).is_dir() else since.partition("@")[0]
    evidence = since_earlier(compare(earlier, release), f"{name}@{manifest.version}")
    return release.with_files({CHANGES: to_json(evidence)})
