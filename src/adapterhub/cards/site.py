"""A gallery as static pages: they need no server and no network, and work from a folder."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from adapterhub.cards.changes import describe_changes
from adapterhub.cards.gallery import Exhibit, Gallery, Shelf
from adapterhub.cards.page import page_environment, page_style
from adapterhub.cards.prose import describe_failures, headline, summarize
from adapterhub.cards.rendering import PAGE, render_files
from adapterhub.cards.snippets import TEMPLATES
from adapterhub.errors import ReleaseError
from adapterhub.packaging.files import check_relative_path, check_target, write_atomic

INDEX = "index.html"
COMPARE = "compare.html"
DATA = "site.json"


def render_site(gallery: Gallery, title: str) -> dict[str, bytes]:
    """The site's files by path. The same releases give the same bytes.

    ``site.json`` holds the same as data, and which files the site is made of.
    """
    files = {
        INDEX: _render("site_index.html.j2", "site.js", title=title, gallery=gallery),
        COMPARE: _render_comparison(gallery, title),
    }
    for shelf in gallery.shelves:
        files[f"{_folder(shelf)}/{INDEX}"] = _render_shelf(shelf, title)
        for exhibit in shelf.versions:
            here = f"{_folder(shelf)}/{exhibit.version}"
            files[f"{here}/{PAGE}"] = render_files(exhibit.card)[PAGE]
            files |= {f"{here}/{name}": (exhibit.folder / name).read_bytes() for name in exhibit.files}
    data = {
        "schema_version": 1,
        "releases": [exhibit.facts for shelf in gallery.shelves for exhibit in shelf.versions],
        "not_shown": [{"ref": it.ref, "why": it.why} for it in gallery.absent],
        "files": sorted([*files, DATA]),
    }
    return files | {DATA: _to_json(data)}


def write_site(files: Mapping[str, bytes], folder: Path) -> None:
    """Put a site into ``folder``, which is new, empty, or an earlier site: what that alone had is removed.

    Files that are no part of it stay. Raises ReleaseError as ``earlier_files`` does.
    """
    earlier = earlier_files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The list goes first: whatever was written before a crash is known to the next run.
    known = json.loads(files[DATA]) | {"files": sorted(earlier | set(files))}
    write_atomic(folder / DATA, _to_json(known))
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
    for name in sorted(earlier - set(files)):
        path = folder / name
        path.unlink(missing_ok=True)
        for above in path.relative_to(folder).parents:
            if above != Path() and (folder / above).is_dir() and not any((folder / above).iterdir()):
                (folder / above).rmdir()


def earlier_files(folder: Path) -> set[str]:
    """What the earlier site in ``folder`` is made of; nothing where a new one can be made.

    Raises ReleaseError for a folder that holds something else.
    """
    if not (folder / DATA).is_file():
        check_target(folder)
        return set()
    try:
        return {check_relative_path(name) for name in json.loads((folder / DATA).read_bytes())["files"]}
    except (ValueError, LookupError, TypeError) as err:
        raise ReleaseError(
            f"{folder / DATA} is not a site's list of files", "choose another --out, or remove that folder"
        ) from err


def _render(template: str, script: str | None, **values: Any) -> bytes:
    """A page with its style and script inside, which alone its own policy lets run."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if script is not None:
        digest = sha256((TEMPLATES / script).read_bytes()).digest()
        policy += f"; script-src 'sha256-{b64encode(digest).decode()}'"
    environment = page_environment()
    environment.filters |= {"exact": _exact, "link": _link}
    return (
        environment.get_template(template)
        .render(
            style=page_style("page.css") + page_style("site.css"),
            script=page_style(script) if script else None,
            policy=policy,
            **values,
        )
        .encode()
    )


def _render_shelf(shelf: Shelf, title: str) -> bytes:
    card = shelf.newest.card
    return _render(
        "site_release.html.j2",
        None,
        title=title,
        shelf=shelf,
        summary=summarize(card),
        headline=headline(card),
        failures=describe_failures(card),
        changes={it.version: describe_changes(it.card) for it in shelf.versions},
    )


def _render_comparison(gallery: Gallery, title: str) -> bytes:
    from markupsafe import Markup

    facts = [exhibit.facts for shelf in gallery.shelves for exhibit in shelf.versions]
    # In a script element only "<" could end the data, and JSON can spell it otherwise.
    data = json.dumps(facts, ensure_ascii=False, sort_keys=True).replace("<", "\\u003c")
    return _render("site_compare.html.j2", "compare.js", title=title, gallery=gallery, data=Markup(data))


def _exact(exhibit: Exhibit) -> dict[str, str] | None:
    """The score that the index shows: exact match of the adapter, its interval, and the base's."""
    return next((it for it in exhibit.facts["scores"] if it["name"] == "exact match"), None)


def _link(exhibit: Exhibit) -> str:
    """A version's card, from the page of its release."""
    return f"{exhibit.version}/{PAGE}"


def _folder(shelf: Shelf) -> str:
    return f"releases/{shelf.newest.name}"


def _to_json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()
