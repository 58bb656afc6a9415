"""The part of push that makes datasets: rows in files become a release."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.progress import show_transfer
from adapterhub.commands.signing import PASSWORD_VARIABLE
from adapterhub.errors import DataError

if TYPE_CHECKING:
    from adapterhub.hub.publishing import Published
    from adapterhub.hub.push import Delivery, Pushed


_OPTIONS = (
    click.option("--version", help="The dataset's version; without it 1.0.0, or the next minor one."),
    click.option("--licence", help="The rows' licence: an SPDX identifier, or the Hub's name for it."),
    click.option("--task", help="One sentence for the dataset's card: what is in it."),
    click.option("--test", type=click.Path(path_type=Path), help="A file or folder of test rows."),
    click.option(
        "--test-share",
        type=click.FloatRange(0, 1, max_open=True),
        help="Share of the rows to become test rows, chosen by what they say; 0.1 is a tenth.",
    ),
    click.option(
        "--tokenizer",
        metavar="FOLDER|OWNER/NAME",
        help="Measure the rows' lengths in its tokens instead of in words.",
    ),
    click.option(
        "--benchmark",
        "benchmarks",
        multiple=True,
        metavar="[NAME=]FILE",
        help="Compare the train rows with this benchmark's texts; may stand several times.",
    ),
    click.option("--key", type=click.Path(path_type=Path), help="Sign the dataset with this private key."),
)


def dataset_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of push that make a dataset release of rows."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def refuse_dataset_options(options: Mapping[str, Any]) -> None:
    """Raise UsageError when one of them was given, and no dataset is to be made."""
    for name, value in options.items():
        if value not in (None, ()):
            flag = "--" + name.removesuffix("s").replace("_", "-")
            raise click.UsageError(f"{flag} is for rows in files, with --type dataset.")


def publish(
    path: Path,
    repo: str,
    options: Mapping[str, Any],
    *,
    endpoint: str | None,
    delivery: Delivery,
    dry_run: bool,
) -> Pushed:
    """Make a dataset release of the rows in ``path``, push it, and say what was found in the rows."""
    from adapterhub.cards.dataset import render_dataset_card
    from adapterhub.hub.publishing import Wish, publish_rows

    wish = Wish(
        version=options["version"],
        licence=options["licence"],
        task=options["task"],
        test=options["test"],
        test_share=options["test_share"] or 0.0,
        tokenizer=options["tokenizer"],
        benchmarks=parse_benchmarks(options["benchmarks"]),
        key=options["key"],
        password=os.environ.get(PASSWORD_VARIABLE),
    )
    with show_transfer("uploading") as progress:
        published = publish_rows(
            path,
            repo,
            wish,
            render_dataset_card,
            endpoint=endpoint,
            delivery=delivery,
            dry_run=dry_run,
            progress=progress,
        )
    for line in _describe(published):
        click.echo(line, err=True)
    return published.pushed


def parse_benchmarks(values: Sequence[str]) -> dict[str, Path]:
    """``NAME=FILE``, or ``FILE`` whose name without its ending is the name.

    Raises DataError for a name that stands twice.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, equals, file = value.partition("=")
        path = Path(file if equals else value)
        name = name if equals else path.stem
        if name in found or name == "test":
            raise DataError(f"two benchmarks are called {name!r}", "name them with --benchmark NAME=FILE")
        found[name] = path
    return found


def _describe(published: Published) -> list[str]:
    evidence = published.evidence
    rows = " and ".join(f"{split.rows} {split.split} rows" for split in evidence.splits)
    pushed = published.pushed
    sent = [it for it in pushed.files if it.change in ("new", "changed")]
    size = sum(it.size for it in sent)
    outcome = {
        "already there": "these very rows are there already; nothing was sent",
        "tagged": f"these very rows were there already; {pushed.tag} was added",
        "dry run": f"would send {len(sent)} files, {size} bytes; nothing was changed",
        "proposed": f"{len(sent)} files, {size} bytes were sent as a pull request; no tag yet: "
        "push the same again once it is merged",
        "proposed before": "these very rows are proposed already, and wait to be merged; nothing was sent",
    }.get(pushed.outcome, f"{len(sent)} files, {size} bytes were sent")
    lines = [f"{pushed.repo}@{pushed.tag}: {outcome}"]
    lines.append(f"{rows}, each with {evidence.form}; digest {evidence.digest}")
    repeated = sum(evidence.duplicates.repeated.values())
    if repeated:
        lines.append(f"{repeated} rows repeat an earlier one: {', '.join(evidence.duplicates.examples)}")
    if evidence.duplicates.test_in_train:
        lines.append(f"{evidence.duplicates.test_in_train} test rows stand in train too")
    for overlap in evidence.overlaps:
        if overlap.found:
            what = "test rows" if overlap.sha256 is None else f"of {overlap.texts} texts of {overlap.name}"
            lines.append(
                f"{overlap.found} {what} share {evidence.overlap_words} words in a row with train rows"
            )
    for found in evidence.personal_data:
        if found.rows:
            hold = "1 row holds" if found.rows == 1 else f"{found.rows} rows hold"
            lines.append(f"{hold} what looks like: {found.kind} ({', '.join(found.examples)})")
    if published.manifest.licence is None:
        lines.append("no licence is stated: --licence names one")
    return lines
