"""push, pull."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.datasets import dataset_options, publish, refuse_dataset_options
from adapterhub.commands.progress import show_transfer
from adapterhub.commands.targets import naming_kind
from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    from adapterhub.hub.pull import Part, Pulled
    from adapterhub.hub.push import Pushed
    from adapterhub.packaging.anchors import Signer
    from adapterhub.packaging.release import Release

_ENDPOINT = click.option("--endpoint", metavar="URL", help="The Hub to use, instead of $HF_ENDPOINT.")
_CARD = "README.md"
_TYPE = click.option(
    "--type",
    "kind",
    type=click.Choice(["adapter", "dataset"]),
    help="What is meant: a Hub keeps datasets apart.",
)


@click.command("push")
@click.argument("folder", metavar="RELEASE|FILE", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@_TYPE
@dataset_options
@_ENDPOINT
@click.option("--private", is_flag=True, help="Make a new repository readable by its owner alone.")
@click.option("--branch", default="main", show_default=True, help="Commit there; made from main if missing.")
@click.option(
    "--create-pr", is_flag=True, help="Propose the commit as a pull request; push again once merged."
)
@click.option("--message", help="The commit's message, instead of `Release NAME VERSION`.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def push_command(
    folder: Path,
    repo: str,
    kind: str | None,
    endpoint: str | None,
    private: bool,
    branch: str,
    create_pr: bool,
    message: str | None,
    dry_run: bool,
    as_json: bool,
    **rows: Any,
) -> None:
    """Publish the folder RELEASE on a Hub as OWNER/NAME: one commit, tagged with the release's version.

    The token is $HF_TOKEN, or what `hf auth login` stored. A version that is there never changes: raise the
    version to push other content. The same release pushed again changes nothing.

    With `--type dataset`, FILE (or a folder) of rows in .jsonl, .json or .parquet is checked, made a dataset
    release and pushed; the options from --version to --key are for this.
    """
    from adapterhub.hub.push import Delivery, push
    from adapterhub.packaging.manifest import MANIFEST_NAME
    from adapterhub.packaging.release import Release

    if create_pr and private:
        raise click.UsageError("--private makes a new repository, --create-pr needs one that is there.")
    delivery = Delivery(branch, private=private, as_pull_request=create_pr, message=message)
    if kind == "dataset" and not (folder / MANIFEST_NAME).is_file():
        pushed = publish(folder, repo, rows, endpoint=endpoint, delivery=delivery, dry_run=dry_run)
    else:
        refuse_dataset_options(rows)
        if folder.is_file():
            raise ReleaseError(f"{folder} is a file, not a release", "for rows, add --type dataset")
        release = Release.open(folder)
        _check_kind(release, kind)
        _check_card(release)
        with show_transfer("uploading") as progress:
            pushed = push(
                release, repo, endpoint=endpoint, delivery=delivery, dry_run=dry_run, progress=progress
            )
        _say_pushed(release, pushed)
    if as_json:
        click.echo(json.dumps(_pushed_json(pushed), indent=2))
    elif dry_run:
        for it in pushed.files:
            click.echo(f"{it.change:<9} {it.size:>12}  {it.name}")
    elif pushed.outcome.startswith("proposed"):
        click.echo(f"pull request  {pushed.url}")
    else:
        click.echo(f"commit  {pushed.url}\ntag     {pushed.tag}")


@click.command("pull")
@click.argument("ref", metavar="OWNER/NAME[@VERSION|latest]")
@_TYPE
@_ENDPOINT
@click.option("--only", type=click.Choice(["adapter"]), help="Leave out what loading it does not need.")
@click.option("--out", type=click.Path(path_type=Path), help="Copy the release into this folder.")
@click.option("--offline", is_flag=True, help="Ask no Hub: take what was pulled before.")
@click.option(
    "--key",
    "keys",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A public key to accept beside your trusted keys; may stand several times.",
)
@click.option("--require-signed", is_flag=True, help="Refuse what no key you trust has signed.")
@click.option("--locked", is_flag=True, help="Take exactly what adapterhub.lock in this folder holds.")
@click.option(
    "--allow-downgrade", is_flag=True, help="Take an older version than adapterhub.lock in this folder knows."
)
@click.option("--quiet", is_flag=True, help="Show no progress and no words, only errors and warnings.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull_command(
    ref: str,
    kind: str | None,
    endpoint: str | None,
    only: Part | None,
    out: Path | None,
    offline: bool,
    keys: tuple[Path, ...],
    require_signed: bool,
    locked: bool,
    allow_downgrade: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Download a release, check every file of it, and print the folder where it lies.

    VERSION is a version, a branch, a tag or a commit; without it, or with latest, the highest version is
    taken. What was cut off goes on where it was. With --only adapter the card and the evidence stay away:
    manifest, signatures and every file that is taken are checked as ever. Exits 4 when
    a file is not what the release lists, or a signature does not hold.
    """
    from adapterhub.hub.client import offline as without_network
    from adapterhub.hub.lock import pull_locked, pull_not_older
    from adapterhub.hub.lockfile import LOCK_NAME
    from adapterhub.hub.pull import pull

    if locked and (allow_downgrade or kind == "dataset"):
        raise click.UsageError(
            "--locked takes what is locked: leave out --allow-downgrade and --type dataset"
        )
    if only and kind == "dataset":
        raise click.UsageError("--only adapter and --type dataset exclude each other.")
    take: Callable[..., Pulled]
    if kind == "dataset":  # a lock holds adapters and models
        take = partial(pull, ref, repo_type="dataset")
    elif locked:
        take = partial(pull_locked, ref, Path(LOCK_NAME))
    else:
        take = partial(pull_not_older, ref, Path(LOCK_NAME), allow_downgrade=allow_downgrade)
    asking = without_network() if offline else nullcontext()
    with show_transfer("downloading", quiet=quiet) as progress, asking, naming_kind(ref, kind, endpoint):
        pulled = take(
            endpoint=endpoint,
            out=out,
            keys=keys,
            require_signed=require_signed,
            only=only,
            progress=progress,
        )
    _check_kind(pulled.release, kind)
    if not quiet:
        _say_pulled(pulled)
    if as_json:
        click.echo(json.dumps(_pulled_json(pulled), indent=2))
    else:
        click.echo(str(pulled.release.path))


def _check_kind(release: Release, kind: str | None) -> None:
    """Raise ReleaseError when a dataset was asked for and this is none, or the other way round."""
    is_dataset = release.manifest.kind == "dataset"
    if kind is not None and is_dataset != (kind == "dataset"):
        fix = "leave out --type, or name another release"
        raise ReleaseError(f"{release.path} is of kind {release.manifest.kind}, not {kind}", fix)


def _check_card(release: Release) -> None:
    """Raise ReleaseError when README.md, which a Hub shows as the card, is missing or tells of another state.

    The page and its picture are left to `card --check`: their bytes may differ with matplotlib's version.
    """
    if _CARD not in release.manifest.files:
        raise ReleaseError(f"{release.path} has no card", f"make it: adapterhub card {release.path}")
    if release.manifest.base is None:  # a dataset's, or one that its maker wrote
        return
    from adapterhub.cards.card import read_card
    from adapterhub.cards.rendering import check_files, render_text

    release.check_files(only=[_CARD])  # a changed file is not a stale one
    check_files(release, {_CARD: render_text(read_card(release))})


def _say_pushed(release: Release, pushed: Pushed) -> None:
    sent = [it for it in pushed.files if it.change in ("new", "changed")]
    told = {
        "pushed": f"{len(sent)} of {len(pushed.files)} files were new or changed",
        "tagged": f"the files were there already; {pushed.tag} was added",
        "already there": "the very same release is there already; nothing was sent",
        "proposed": f"{len(sent)} of {len(pushed.files)} files are proposed, as a pull request; no tag yet: "
        "push the same again once it is merged",
        "proposed before": "this very release is proposed already, and waits to be merged; nothing was sent",
        "dry run": f"would send {len(sent)} files, {sum(it.size for it in sent)} bytes; nothing was changed",
    }
    _say(f"{pushed.repo}@{pushed.tag}: {told[pushed.outcome]}")
    if not release.is_signed:
        _say("the release is not signed: `adapterhub sign` lets others check that it is yours")
    elif pushed.signer is None:
        _say("its signature was not checked: none of your trusted keys made it")
    if pushed.kept:
        _say(f"left alone, not part of the release: {', '.join(pushed.kept[:5])}")


def _say_pulled(pulled: Pulled) -> None:
    manifest, taken = pulled.release.manifest, len(pulled.files)
    files = f"{taken} files" if taken == len(manifest.files) else f"{taken} of {len(manifest.files)} files"
    _say(
        f"{pulled.repo} at {pulled.commit[:12]}: {manifest.name} {manifest.version}, "
        f"{files}, {_taken_bytes(pulled)} bytes, all as its manifest lists them"
    )
    for signer in pulled.signers:
        _say(f"signed by {signer}  ({signer.source})")
    if pulled.signers:
        return
    if pulled.release.is_signed:
        from adapterhub.packaging.bundles import SIGNATURE_NAME, read_bundle
        from adapterhub.packaging.verification import how_to_trust

        ref = f"{pulled.repo}@{pulled.tag or pulled.commit}"
        trust = how_to_trust(read_bundle(pulled.release.path, SIGNATURE_NAME), pulled.repo, ref)
        _say(
            "signed by somebody you do not trust, so the signature says nothing. To trust who made it, and "
            f"to ask for that from now on: {trust}"
        )
    else:
        _say("not signed: nothing shows who made it")


def _say(words: str) -> None:
    click.echo(words, err=True)


def _pushed_json(pushed: Pushed) -> dict[str, Any]:
    return {
        "repo": pushed.repo,
        "tag": pushed.tag,
        "outcome": pushed.outcome,
        "commit": pushed.commit,
        "url": pushed.url,
        "files": [asdict(it) for it in pushed.files],
        "kept": list(pushed.kept),
        "signer": _signer_json(pushed.signer),
    }


def _pulled_json(pulled: Pulled) -> dict[str, Any]:
    manifest = pulled.release.manifest
    return {
        "path": str(pulled.release.path),
        "repo": pulled.repo,
        "commit": pulled.commit,
        "tag": pulled.tag,
        "offline": pulled.offline,
        "name": manifest.name,
        "version": manifest.version,
        "kind": manifest.kind,
        "digest": pulled.release.digest,
        "signed": pulled.release.is_signed,
        "signer": _signer_json(pulled.signer),
        "signers": [_signer_json(signer) for signer in pulled.signers],
        "files": len(pulled.files),
        "bytes": _taken_bytes(pulled),
        "complete": len(pulled.files) == len(manifest.files),
    }


def _taken_bytes(pulled: Pulled) -> int:
    return sum(pulled.release.manifest.files[name].size for name in pulled.files)


def _signer_json(signer: Signer | None) -> dict[str, str | None] | None:
    return asdict(signer) | {"source": str(signer.source)} if signer else None
