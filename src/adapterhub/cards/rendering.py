"""All files of a card, made together and held together."""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub.cards.card import Card
from adapterhub.cards.markdown import render_readme
from adapterhub.cards.page import render_page
from adapterhub.cards.plots import draw_curve, standalone
from adapterhub.cards.prose import describe_run
from adapterhub.errors import ReleaseError
from adapterhub.packaging.release import Release

README = "README.md"
PAGE = "card.html"
CURVE_PICTURE = "evidence/curve.svg"


def render_files(card: Card) -> dict[str, bytes]:
    """The card's files by their path in the release: README.md, card.html and, with a curve, its picture.

    The same release gives the same bytes, on the same version of this package and matplotlib.
    """
    description = describe_run(card)
    if card.curve is None or description is None:
        return {README: render_readme(card, picture=None), PAGE: render_page(card, picture=None)}
    svg = draw_curve(card.curve, description)
    return {
        README: render_readme(card, picture=CURVE_PICTURE),
        PAGE: render_page(card, picture=svg),
        CURVE_PICTURE: standalone(svg),
    }


def check_files(release: Release, files: Mapping[str, bytes]) -> None:
    """Raise ReleaseError for the first of the card's ``files`` that the release lacks or holds otherwise."""
    fix = f"make it again: adapterhub card {release.path}"
    for name, expected in files.items():
        path = release.path / name
        if not path.is_file():
            raise ReleaseError(f"{path} is missing", fix)
        if path.read_bytes() != expected:
            raise ReleaseError(f"{path} does not match the release's manifest and evidence", fix)
