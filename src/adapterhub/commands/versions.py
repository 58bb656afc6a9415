"""log, bump."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from adapterhub.commands.fields import print_fields
from adapterhub.commands.targets import naming_folder_or_ref, open_checked, refuse_cached
from adapterhub.errors import AdapterHubError, ReleaseError, SignatureError
from adapterhub.packaging.files import cached_ref

if TYPE_CHECKING:
    from adapterhub.hub.lineage import Ancestor
    from adapterhub.packaging.release import Release
    from adapterhub.packaging.versions import Bump

_ENDPOINT = click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")


@click.command("log")
@click.argument("ref", metavar="RELEASE|REF")
@_ENDPOINT
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def log_command(ref: str, endpoint: str | None, as_json: bool) -> None:
    """Print where a release comes from: its parent, that one's parent, back to the first.

    Each is held to the digest that its successor recorded. Of a release on a Hub, the versions there follow.
    """
    from adapterhub.hub.lineage import Ancestor, list_versions, trace
    from adapterhub.hub.refs import parse_ref

    release = open_checked(ref, endpoint)
    at = cached_ref(release.path)
    chain = [Ancestor(ref, release.digest, at and at.partition("@")[2], release.manifest, None)]
    chain += trace(release.manifest.parent, endpoint=endpoint)
    there = [] if Path(ref).is_dir() else list_versions(parse_ref(ref).repo, endpoint=endpoint)
    if as_json:
        click.echo(json.dumps(_log_json(chain, there), indent=2, ensure_ascii=False))
        return
    print_fields(_log_lines(chain, there))


@click.command("bump")
@click.argument("level", metavar="LEVEL", type=click.Choice(["auto", "major", "minor", "patch"]))
@click.argument("release", type=click.Path(path_type=Path))
@click.option(
    "--parent", metavar="RELEASE|REF", help="The release before it. Default: the one that its manifest names."
)
@_ENDPOINT
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bump_command(
    level: Literal["auto", "major", "minor", "patch"],
    release: Path,
    parent: str | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Give the folder RELEASE the version that follows its parent's: LEVEL is auto, major, minor or patch.

    auto decides by what changed: major when base, chat template, tokens or task did, minor when the weights
    did, patch when only card, evidence or records did. A LEVEL below that is refused. Version and parent are
    written into the manifest; a signature is removed, and a card that matched is made again.
    """
    from adapterhub.packaging.release import Release
    from adapterhub.packaging.versions import apply_bump, plan_bump

    refuse_cached(release)
    opened = Release.open(release)
    opened.check_files()
    before, ref = _find_parent(opened, parent, endpoint)
    bump = plan_bump(opened, before, ref, level)
    card_matched, was_signed = _card_matches(opened), opened.is_signed
    bumped = apply_bump(opened, bump)
    _say_bumped(opened, bumped, bump, was_signed=was_signed)
    if bumped.manifest != opened.manifest:
        _renew_card(bumped, matched=card_matched)
    click.echo(json.dumps(_bump_json(release, bump), indent=2) if as_json else bump.version)


def _find_parent(release: Release, parent: str | None, endpoint: str | None) -> tuple[Release, str]:
    """The release before it, checked, and how the manifest is to name it."""
    from adapterhub.hub.pull import pull

    if parent is not None and Path(parent).is_dir():
        opened = open_checked(parent, endpoint)
        named = f"{opened.manifest.name}@{opened.manifest.version}"
        return opened, cached_ref(Path(parent)) or named
    recorded = release.manifest.parent
    if parent is None and (recorded is None or "/" not in recorded.ref):
        known = f"names its parent only as {recorded.ref}" if recorded else "names no parent"
        raise ReleaseError(
            f"{release.path} {known}",
            "name the release before it with --parent; the first release keeps its recipe's version",
        )
    source = parent if parent is not None else recorded.ref if recorded else ""
    with naming_folder_or_ref(source):
        pulled = pull(source, endpoint=endpoint)
    if parent is None and recorded is not None and pulled.release.digest != recorded.manifest_sha256:
        raise SignatureError(
            f"{source} is not the release that {release.path} names as its parent",
            "the version was moved: ask its maker, or name another with --parent",
        )
    at = pulled.release.manifest.version if pulled.tag else pulled.commit
    return pulled.release, f"{pulled.repo}@{at}"


def _card_matches(release: Release) -> bool | None:
    """Whether the release's card is the one that would be made of it; None when it has none."""
    from adapterhub.cards.card import read_card
    from adapterhub.cards.rendering import README, check_files, render_files

    if README not in release.manifest.files or release.manifest.base is None:
        return None
    try:
        check_files(release, render_files(read_card(release)))
    except AdapterHubError:
        return False
    return True


def _renew_card(release: Release, *, matched: bool | None) -> None:
    from adapterhub.cards.card import read_card
    from adapterhub.cards.rendering import render_files

    if matched:
        release.with_files(render_files(read_card(release)))
        _say("its card was made again")
    elif matched is not None:
        _say(f"its card did not match before and was left alone: `adapterhub card {release.path}` makes it")


def _say_bumped(old: Release, new: Release, bump: Bump, *, was_signed: bool) -> None:
    from adapterhub.cards.escaping import one_line

    for change in bump.changes:
        _say(f"{change.level:<5}  {change.part}: {one_line(change.what)}")
    if new.manifest == old.manifest:
        _say(f"{new.path} is {bump.version} after {bump.parent.ref} already")
        return
    _say(f"{bump.level}: {old.manifest.version} becomes {bump.version}, after {bump.parent.ref}")
    if was_signed:
        _say(
            f"its signature was of {old.manifest.version} and was removed: `adapterhub sign` makes a new one"
        )


def _bump_json(folder: Path, bump: Bump) -> dict[str, Any]:
    return {
        "release": str(folder),
        "version": bump.version,
        "level": bump.level,
        "demanded": bump.demanded,
        "changes": [asdict(change) for change in bump.changes],
        "parent": bump.parent.model_dump(),
    }


def _log_json(chain: list[Ancestor], there: list[str]) -> dict[str, Any]:
    lineage = [
        {
            "ref": it.ref,
            "name": it.manifest and it.manifest.name,
            "version": it.manifest and it.manifest.version,
            "kind": it.manifest and it.manifest.kind,
            "created": it.manifest and it.manifest.created.isoformat(),
            "digest": it.digest,
            "commit": it.commit,
            "problem": it.problem,
        }
        for it in chain
    ]
    return {"lineage": lineage, "complete": chain[-1].manifest is not None, "versions": there}


def _log_lines(chain: list[Ancestor], there: list[str]) -> Iterator[tuple[str, str]]:
    for it in chain:
        found = it.manifest
        if found is None:
            yield "?", f"{it.digest[:12]}…  {it.ref}: {it.problem}"
        else:
            what = f"{found.kind} {found.name}, {it.ref}"
            yield found.version, f"{found.created:%Y-%m-%d}  {it.digest[:12]}…  {what}"
    if chain[-1].manifest is not None:
        yield "", "the first: it names no parent"
    if there:
        yield "", f"on the Hub: {', '.join(there)}"


def _say(words: str) -> None:
    click.echo(words, err=True)
