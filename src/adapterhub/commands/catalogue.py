"""list, search, info, repo: what a Hub holds, and keeping house there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.fields import print_fields
from adapterhub.commands.progress import in_units
from adapterhub.commands.targets import naming_kind

if TYPE_CHECKING:
    from adapterhub.hub.catalogue import Described, Listed
    from adapterhub.hub.client import RepoType

_CHANGES_SHOWN = 12


def _hub_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
        click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT."),
        click.option(
            "--type",
            "kind",
            type=click.Choice(["adapter", "dataset"]),
            default="adapter",
            show_default=True,
            help="What is meant: a Hub keeps datasets apart.",
        ),
    ):
        command = option(command)
    return command


@click.command("list")
@click.argument("owner", required=False)
@_hub_options
def list_command(owner: str | None, kind: str, endpoint: str | None, as_json: bool) -> None:
    """List the repositories of OWNER, the latest change first: version, base, who may read it.

    Without OWNER: yours on the public Hub, all of a Hub of your own.
    """
    from adapterhub.hub.catalogue import list_repos

    _print_listed(list_repos(owner, _repo_type(kind), endpoint=endpoint), as_json)


@click.command("search")
@click.argument("words", required=False)
@click.option("--base", metavar="OWNER/NAME", help="Made of this base model.")
@click.option("--task", help="For this task, in the Hub's word: text-generation.")
@click.option("--limit", type=click.IntRange(min=1), default=30, show_default=True, help="At most so many.")
@_hub_options
def search_command(
    words: str | None,
    base: str | None,
    task: str | None,
    limit: int,
    kind: str,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Find releases whose names hold WORDS, made of a base or for a task.

    Releases are told by the tag that the cards of adapterhub carry.
    """
    from adapterhub.hub.catalogue import search_repos

    found = search_repos(
        words, base=base, task=task, repo_type=_repo_type(kind), limit=limit, endpoint=endpoint
    )
    _print_listed(found, as_json)


@click.command("info")
@click.argument("ref", metavar="OWNER/NAME[@VERSION|latest]")
@_hub_options
def info_command(ref: str, kind: str, endpoint: str | None, as_json: bool) -> None:
    """Say what a release on a Hub is: versions, base, scores, signer, size, and what it changed.

    Manifest and signatures are checked as by a pull; no weights are downloaded. `adapterhub diff` looks
    inside weights and tokens.
    """
    from adapterhub.hub.catalogue import describe

    with naming_kind(ref, kind, endpoint):
        found = describe(ref, _repo_type(kind), endpoint=endpoint)
    if as_json:
        click.echo(json.dumps(_described_json(found), indent=2, ensure_ascii=False))
        return
    print_fields(_described_lines(found))


@click.group("repo")
def repo_command() -> None:
    """Keep house in a repository on a Hub: another name, a tag less."""


@repo_command.command("move")
@click.argument("source", metavar="OWNER/NAME")
@click.argument("target", metavar="OWNER/NAME")
@_hub_options
def move_command(source: str, target: str, kind: str, endpoint: str | None, as_json: bool) -> None:
    """Give a repository another name or owner, with everything in it."""
    from adapterhub.hub.catalogue import move_repo

    url = move_repo(source, target, _repo_type(kind), endpoint=endpoint)
    click.echo(json.dumps({"from": source, "to": target, "url": url}, indent=2) if as_json else url)


@repo_command.command("untag")
@click.argument("ref", metavar="OWNER/NAME@VERSION")
@_hub_options
def untag_command(ref: str, kind: str, endpoint: str | None, as_json: bool) -> None:
    """Take a version's tag away: nobody can pull it by its version any more. Commit and files stay.

    Prints the commit that the tag named; it can still be pulled by that. The version is not free again: other
    content needs a version above it.
    """
    from adapterhub.hub.catalogue import remove_tag

    commit = remove_tag(ref, _repo_type(kind), endpoint=endpoint)
    click.echo(json.dumps({"ref": ref, "commit": commit}, indent=2) if as_json else commit)


def _repo_type(kind: str) -> RepoType:
    return "dataset" if kind == "dataset" else "model"


def _print_listed(found: Sequence[Listed], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(it) for it in found], indent=2, ensure_ascii=False))
        return
    if not found:
        click.echo("nothing found", err=True)
    rows = [
        (
            it.repo,
            it.version or "no version",
            (it.modified or "")[:10],
            "private" if it.private else "public",
            it.base or it.task or "",
        )
        for it in found
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
    for row in rows:
        line = "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        click.echo("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line))


def _described_lines(found: Described) -> Iterator[tuple[str, str]]:
    pulled, manifest = found.pulled, found.pulled.release.manifest
    yield "release", f"{pulled.repo}@{pulled.tag or pulled.commit}: {manifest.name} {manifest.version}"
    yield "kind", manifest.kind
    yield "versions", ", ".join(found.versions) or "none"
    yield "commit", pulled.commit
    yield "created", f"{manifest.created:%Y-%m-%d %H:%M} UTC"
    yield "size", f"{in_units(pulled.release.size)} in {len(manifest.files)} files"
    if manifest.base is not None:
        at = f" at {manifest.base.revision[:12]}" if manifest.base.revision else ""
        yield "base", f"{manifest.base.name}{at}, digest {manifest.base.digest[:12]}…"
    yield "task", manifest.task or "not said"
    yield "licence", manifest.licence or "not said"
    for data in manifest.datasets:
        yield "data", f"{data.split}: {data.rows} rows of {data.source}"
    yield from (("scores", line) for line in _score_lines(found))
    for signer in pulled.signers:
        yield "signer", str(signer)
    if not pulled.signers:
        yield "signer", "somebody you do not trust" if pulled.release.is_signed else "none: it is not signed"
    yield from _change_lines(found)


def _score_lines(found: Described) -> Iterator[str]:
    from adapterhub.packaging.evidence import SCORES, ScoresEvidence, read_evidence

    release = found.pulled.release
    scores = read_evidence(release.path, SCORES, ScoresEvidence) if SCORES in found.pulled.files else None
    if scores is None:
        if release.manifest.kind != "dataset":
            yield "not measured"
        return
    for score in scores.scores:
        figures = f"{score.metric}: base {score.base:.4g}, adapter {score.adapter:.4g}"
        yield f"{figures} ({score.unit}, {score.rows} rows)"


def _change_lines(found: Described) -> Iterator[tuple[str, str]]:
    if found.changes is None:
        yield "changes", "the first version here"
        return
    if not found.changes:
        yield "changes", f"nothing but the version since {found.previous}"
    for change in found.changes[:_CHANGES_SHOWN]:
        yield "changes", f"since {found.previous}: {change.part}: {change.what} ({change.level})"
    if len(found.changes) > _CHANGES_SHOWN:
        yield "changes", f"and {len(found.changes) - _CHANGES_SHOWN} more"


def _described_json(found: Described) -> dict[str, Any]:
    from adapterhub.packaging.evidence import SCORES, ScoresEvidence, read_evidence

    pulled, manifest = found.pulled, found.pulled.release.manifest
    folder = pulled.release.path
    scores = read_evidence(folder, SCORES, ScoresEvidence) if SCORES in pulled.files else None
    return {
        "repo": pulled.repo,
        "tag": pulled.tag,
        "commit": pulled.commit,
        "versions": list(found.versions),
        "manifest": manifest.model_dump(mode="json", exclude={"files"}),
        "digest": pulled.release.digest,
        "bytes": pulled.release.size,
        "files": len(manifest.files),
        "scores": scores and scores.model_dump(mode="json"),
        "signed": pulled.release.is_signed,
        "signers": [asdict(signer) | {"source": str(signer.source)} for signer in pulled.signers],
        "previous": found.previous,
        "changes": None if found.changes is None else [asdict(change) for change in found.changes],
    }
