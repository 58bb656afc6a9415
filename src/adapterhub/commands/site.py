"""site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    from adapterhub.cards.gallery import Gallery

_OWNER = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


@click.command("site")
@click.argument("source", metavar="DIR|OWNER")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The site's folder: new, or an earlier site.",
)
@click.option("--title", help="Of the site. Default: the folder's or the owner's name.")
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
def site_command(source: str, out: Path, title: str | None, endpoint: str | None) -> None:
    """Make a static site of all releases in the folder DIR, or of an OWNER on the Hub, and print its index.

    An index to search and sort, a page for each release with the cards of its versions, and a page that puts
    two versions side by side. It needs no server and no network. From a Hub, weights are not downloaded. What
    cannot be shown is listed with its error. A rerun makes the same bytes of the same releases.
    """
    from adapterhub.cards.site import INDEX, earlier_files, render_site, write_site

    earlier_files(out)  # refuses a folder of something else before the work
    gallery = _gallery(source, endpoint)
    name = title or (Path(source).resolve().name if Path(source).is_dir() else source)
    write_site(render_site(gallery, name), out)
    for absent in gallery.absent:
        click.echo(f"not shown: {absent.ref}: {absent.why}", err=True)
    versions = sum(len(shelf.versions) for shelf in gallery.shelves)
    click.echo(f"{len(gallery.shelves)} releases, {versions} versions", err=True)
    click.echo(out / INDEX)


def _gallery(source: str, endpoint: str | None) -> Gallery:
    from adapterhub.cards.gallery import Absent, collect, find_releases

    folder = Path(source)
    if folder.is_dir():
        return collect((_shown_path(path, folder), path) for path in find_releases(folder))
    if not _OWNER.fullmatch(source):
        raise ReleaseError(f"{source}: no such folder", "name a folder of releases, or an owner on the Hub")
    from adapterhub.hub.gallery import fetch_shown

    absent: list[Absent] = []

    def releases() -> Iterator[tuple[str, Path]]:
        for shown in fetch_shown(source, endpoint=endpoint):
            if shown.problem is not None:
                absent.append(Absent(shown.ref, shown.problem.what, shown.problem.fix))
            elif shown.folder is not None:
                yield shown.ref, shown.folder

    found = list(releases())
    return collect(found, absent)


def _shown_path(path: Path, folder: Path) -> str:
    """A release below ``folder``, as a reader of the site may know it: no path of this machine."""
    inside = path.relative_to(folder)
    return path.resolve().name if inside == Path() else inside.as_posix()
