"""Licences: the Hub's names for them, what a release takes over from base and data, and where they conflict.

Told by the licences' names alone; that is no legal advice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adapterhub.packaging.manifest import Manifest

# https://huggingface.co/docs/hub/repositories-licenses: the Hub refuses any other value of `license`.
# fmt: off
HUB_LICENCES = frozenset(
    {
        "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
        "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0",
        "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
        "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
        "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
        "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl",
        "lgpl-2.1", "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl",
        "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1",
        "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license", "llama2", "llama3",
        "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "unknown", "other",
    }
)
_PERMISSIVE = frozenset(
    {
        "apache-2.0", "mit", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
        "bsd-3-clause-clear", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
        "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "etalab-2.0", "isc", "odc-by",
        "postgresql", "ncsa", "unlicense", "zlib", "pddl",
    }
)
_NOT_COMMERCIAL = ("cc-by-nc", "h-research", "intel-research", "apple-amlr", "c-uda")
_NO_ADAPTED = ("cc-by-nd", "cc-by-nc-nd")
_SAME_AGAIN = (
    "gpl", "agpl", "lgpl", "cc-by-sa", "cc-by-nc-sa", "odbl", "cdla-sharing", "osl", "eupl", "gfdl", "llama",
    "gemma", "openrail", "bigscience", "bigcode-openrail", "creativeml-openrail", "deepfloyd",
)
# fmt: on


@dataclass(frozen=True)
class Source:
    """Something the release was made from."""

    what: str
    """Like ``the base owner/name``."""
    licence: str | None


@dataclass(frozen=True)
class Licensing:
    """The licence a release goes by, and what speaks against it."""

    licence: str | None
    """None: its author states none, and base and data give none to carry on."""
    is_carried: bool
    """Taken over from base and data, for its author states none."""
    conflicts: tuple[str, ...]
    """What base or data ask for, and the release's licence does not give, in words."""


def find_licensing(manifest: Manifest) -> Licensing:
    """The licence of a release, and its conflicts with those of its base and its training data."""
    sources = list(_sources(manifest))
    stated = manifest.licence
    licence = stated if stated is not None else _carried(sources)
    return Licensing(licence, stated is None and licence is not None, tuple(_conflicts(licence, sources)))


def _sources(manifest: Manifest) -> Iterator[Source]:
    if manifest.base is not None:
        yield Source(f"the base {manifest.base.name}", manifest.base.licence)
    for data in manifest.datasets:
        if data.split == "train":
            yield Source(f"the training data {data.source}", data.licence)


def _carried(sources: Sequence[Source]) -> str | None:
    """The one licence that base and data bind a release to: the only strict one, or the base's own."""
    licences = [source.licence.lower() for source in sources if source.licence is not None]
    if len(licences) < len(sources) or not licences or any(_starts(name, _NO_ADAPTED) for name in licences):
        return None
    strict = {name for name in licences if name not in _PERMISSIVE}
    if not strict:
        return licences[0]
    return strict.pop() if len(strict) == 1 else None


def _conflicts(licence: str | None, sources: Sequence[Source]) -> Iterator[str]:
    ours = (licence or "").lower()
    named = f"the release names {licence}" if licence is not None else "the release names none"
    for source in sources:
        theirs = (source.licence or "").lower()
        where = f"{source.what} is under {source.licence}"
        if _starts(theirs, _NO_ADAPTED):
            yield f"{where}, which allows no adapted works"
        elif _starts(theirs, _NOT_COMMERCIAL) and not _starts(ours, _NOT_COMMERCIAL):
            yield f"{where}, which allows no commercial use; {named}"
        elif _starts(theirs, _SAME_AGAIN) and ours != theirs:
            yield f"{where}, whose terms go with what is made from it; {named}"


def _starts(licence: str, beginnings: Sequence[str]) -> bool:
    return licence.startswith(tuple(beginnings))
