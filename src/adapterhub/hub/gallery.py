"""What a gallery shows of an owner's releases on a Hub: every version, without its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import AdapterHubError, HubError, RefError
from adapterhub.hub.client import connect, hub_errors, list_tags
from adapterhub.hub.refs import Ref, version_of
from adapterhub.hub.snapshots import HubFile, fetch
from adapterhub.packaging.files import MANIFEST_NAME

_SHOWN = (MANIFEST_NAME, "adapter_config.json", "notes.md", "card.md.j2")
_LARGEST = 64 * 2**20  # bytes of a file that a gallery takes


@dataclass(frozen=True)
class Shown:
    """One version of a release on a Hub."""

    ref: str
    folder: Path | None
    """In the Hugging Face cache, with what a card is made of; None when it could not be had."""
    problem: AdapterHubError | None = None


def fetch_shown(owner: str, *, endpoint: str | None = None, token: str | None = None) -> Iterator[Shown]:
    """Every version of every release that ``owner`` has on a Hub, by name, with what cards are made of.

    Repositories without a version tag, or whose tags hold no manifest, are no releases and are left out. A
    version that cannot be had is shown with its problem. Raises HubError when the Hub cannot be reached.
    """
    api = connect(endpoint, token)
    with hub_errors(api, owner):
        names = sorted(model.id for model in api.list_models(author=owner))
    if not names:
        raise RefError(f"{api.endpoint} lists no models of {owner}", "check the name, or name a folder")
    for name in names:
        try:
            tags = list_tags(api, Ref(name, None))
        except HubError as err:
            yield Shown(name, None, err)
            continue
        for tag, commit in sorted(tags.items()):
            ref = Ref(name, tag)
            if not tag.startswith("v") or version_of(tag) is None:
                continue
            try:
                snapshot = fetch(api, ref, commit, "gallery", _choose)
            except AdapterHubError as err:
                yield Shown(str(ref), None, err)
                continue
            if MANIFEST_NAME in snapshot.digests:
                yield Shown(str(ref), snapshot.folder)


def _choose(listed: Mapping[str, HubFile]) -> Sequence[str]:
    if MANIFEST_NAME not in listed:
        return []
    wanted = [name for name in listed if name in _SHOWN or name.startswith("evidence/")]
    return [name for name in wanted if listed[name].size <= _LARGEST]
