"""All files of a card, made together and held together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any

from adapterhub.cards.card import Card
from adapterhub.cards.content import gather
from adapterhub.cards.lineage import draw_lineage
from adapterhub.cards.markdown import render_readme
from adapterhub.cards.measurements import describe_layers
from adapterhub.cards.page import render_page
from adapterhub.cards.plots import draw_curve, draw_layers, standalone
from adapterhub.cards.prose import describe_run
from adapterhub.cards.results import results_files
from adapterhub.errors import ReleaseError
from adapterhub.packaging.release import Release

README = "README.md"
PAGE = "card.html"


def render_files(card: Card) -> dict[str, bytes]:
    """The card's files by their path in the release: README.md, card.html, pictures, results, author's words.

    The same release gives the same bytes, on the same version of this package and matplotlib. Raises
    ReleaseError for words of the author's that a card cannot hold.
    """
    content, plan = gather(card), _plan_pictures(card)
    pictures = {name: draw() for name, draw in plan.items()}
    return {
        README: _render_readme(card, content, plan),
        PAGE: render_page(card, content, pictures),
        **{picture_path(name): standalone(svg) for name, svg in pictures.items()},
        **results_files(card),
        **card.words.files,
    }


def render_text(card: Card) -> bytes:
    """README.md as ``render_files`` has it, without drawing the pictures that it shows: that takes most of a
    card's time."""
    return _render_readme(card, gather(card), _plan_pictures(card))


def picture_path(name: str) -> str:
    """Where a picture lies in a release."""
    return f"evidence/{name}.svg"


def check_files(release: Release, files: Mapping[str, bytes]) -> None:
    """Raise ReleaseError for the first of the card's ``files`` that the release lacks or holds otherwise."""
    fix = f"make it again: adapterhub card {release.path}"
    for name, expected in files.items():
        path, entry = release.path / name, release.manifest.files.get(name)
        if not path.is_file():
            raise ReleaseError(f"{path} is missing", fix)
        if path.read_bytes() != expected:
            raise ReleaseError(f"{path} does not match the release's manifest and evidence", fix)
        if entry is None or entry.sha256 != sha256(expected).hexdigest():
            raise ReleaseError(f"{path} is not listed in the manifest as it is", fix)


def _render_readme(card: Card, content: dict[str, Any], pictures: Iterable[str]) -> bytes:
    return render_readme(card, content, {name: picture_path(name) for name in pictures})


def _plan_pictures(card: Card) -> dict[str, Callable[[], str]]:
    """The card's pictures by name; each is drawn, as an SVG element, when it is called."""
    pictures: dict[str, Callable[[], str]] = {}
    run = describe_run(card)
    if card.curve is not None and run is not None:
        pictures["curve"] = partial(draw_curve, card.curve, run)
    layers = describe_layers(card.fidelity) if card.fidelity else None
    if card.fidelity is not None and layers is not None:
        pictures["layers"] = partial(draw_layers, card.fidelity.figures.layers, layers)
    pictures["lineage"] = partial(draw_lineage, card)
    return pictures
