"""Many releases side by side: what a gallery knows of each, and what could not be shown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from adapterhub.cards.card import Card, read_card
from adapterhub.cards.formats import METRICS, in_bytes, in_days, interval_of, quantization_in_words, value_of
from adapterhub.errors import AdapterHubError, ReleaseError
from adapterhub.packaging.evidence import FAILURES
from adapterhub.packaging.files import MANIFEST_NAME
from adapterhub.packaging.manifest import parse_version
from adapterhub.packaging.release import Release


@dataclass(frozen=True)
class Exhibit:
    """One version of one release."""

    card: Card
    folder: Path
    ref: str
    """How a command names it: a folder's path, or owner/name@version."""

    @property
    def name(self) -> str:
        """Of the release."""
        return self.card.manifest.name

    @property
    def version(self) -> str:
        """Its semantic version."""
        return self.card.manifest.version

    @property
    def id(self) -> str:
        """Like ``orders@0.1.0``; one in a gallery."""
        return f"{self.name}@{self.version}"

    @property
    def failures(self) -> int | None:
        """Recorded failure cases; None when nobody measured."""
        return None if self.card.failures is None else len(self.card.failures)

    @property
    def files(self) -> list[str]:
        """What its card links to, as it lies in the release."""
        return [name for name in (MANIFEST_NAME, FAILURES) if (self.folder / name).is_file()]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is compared, as JSON."""
        card = self.card
        manifest, score = card.manifest, card.score("exact_match")
        return {
            "id": self.id,
            "name": self.name,
            "version": self.version,
            "ref": self.ref,
            "kind": manifest.kind,
            "created": in_days(manifest.created),
            "base": card.base.name,
            "base_digest": card.base.digest,
            "held": quantization_in_words(card.base.quantization),
            "task": manifest.task,
            "licence": card.licensing.licence,
            "rank": card.adapter.r if card.adapter else None,
            "weights": in_bytes(card.weights_bytes),
            "exact_match": score.adapter if score else None,
            "rows_sha256": card.scores.data.sha256 if card.scores else None,
            "scores": list(_scores(card)),
            "failures": self.failures,
            "failure_classes": card.failure_classes if card.failures is not None else {},
        }


def _scores(card: Card) -> Iterator[dict[str, Any]]:
    """Every figure with its interval, under a name that is the same only for the same questions."""
    if card.scores is not None:
        on = f"{card.scores.data.rows:,} rows, sha256 {card.scores.data.sha256[:12]}"
        for score in card.scores.scores:
            yield {
                "name": METRICS[score.metric],
                "on": on,
                "base": value_of(score, score.base),
                "adapter": value_of(score, score.adapter),
                "interval": interval_of(score, score.adapter_interval),
            }
    for probe in card.probes.scores if card.probes else ():
        name = probe.probe_class.replace("_", " ") + (f", {probe.tier}" if probe.tier else "")
        assert card.probes is not None
        suites = " ".join(suite.sha256[:12] for suite in card.probes.suites)
        low, high = probe.adapter_interval
        yield {
            "name": f"probes: {name}",
            "on": f"{probe.probes:,} probes, sha256 {suites}",
            "base": f"{100 * probe.base:.1f} %",
            "adapter": f"{100 * probe.adapter:.1f} %",
            "interval": f"{100 * low:.1f} to {100 * high:.1f} %",
        }
    for task in card.tasks.scores if card.tasks else ():
        interval = task.adapter_interval
        yield {
            "name": f"{task.task}: {task.metric}",
            "on": f"{task.questions:,} questions, task {task.task_hash[:12]}",
            "base": f"{task.base:.4f}",
            "adapter": f"{task.adapter:.4f}",
            "interval": f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "not measured",
        }


@dataclass(frozen=True)
class Shelf:
    """All versions of one release, the newest first."""

    versions: tuple[Exhibit, ...]

    @property
    def newest(self) -> Exhibit:
        """The one with the highest version."""
        return self.versions[0]


@dataclass(frozen=True)
class Absent:
    """A release that could not be shown."""

    ref: str
    why: str
    fix: str


@dataclass(frozen=True)
class Gallery:
    """Everything that a site is made of."""

    shelves: tuple[Shelf, ...]
    """By name."""
    absent: tuple[Absent, ...]


def find_releases(folder: Path) -> list[Path]:
    """The folders below ``folder``, or itself, that hold a manifest; not hidden ones, and no links.

    Raises ReleaseError when there are none, OSError for one that cannot be read.
    """

    def refuse(err: OSError) -> None:
        raise err

    found = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [] if MANIFEST_NAME in names else sorted(it for it in folders if not it.startswith("."))
        if MANIFEST_NAME in names:
            found.append(Path(root))
    if not found:
        raise ReleaseError(f"{folder} holds no releases", "name a folder of releases, or an owner on the Hub")
    return sorted(
        found, key=lambda path: (len(path.parts), path)
    )  # of copies, the one that lies highest counts


def collect(releases: Iterable[tuple[str, Path]], absent: Iterable[Absent] = ()) -> Gallery:
    """Read the cards of ``releases`` (how it is named, and its folder).

    One that cannot be read, or whose evidence does not belong to it, is absent and stops no other.
    """
    shown: dict[str, Exhibit] = {}
    missing = list(absent)
    for ref, folder in releases:
        try:
            release = Release.open(folder)
            exhibit = Exhibit(read_card(release), folder, ref)
            if exhibit.id in shown:
                if Release.open(shown[exhibit.id].folder).digest == release.digest:
                    continue  # a copy
                raise ReleaseError(
                    f"{ref} has the name and version of {shown[exhibit.id].ref}",
                    "give it another version, or show only one of them",
                )
        except AdapterHubError as err:
            # A site is for others: what it says names no path of this machine.
            what, fix = (text.replace(str(folder), ref) for text in (err.what, err.fix))
            missing.append(Absent(ref, what, fix))
            continue
        shown[exhibit.id] = exhibit
    ordered = sorted(shown.values(), key=lambda it: it.name)
    shelves = (
        Shelf(tuple(sorted(group, key=lambda it: parse_version(it.version), reverse=True)))
        for _, group in groupby(ordered, key=lambda it: it.name)
    )
    return Gallery(tuple(shelves), tuple(sorted(missing, key=lambda it: it.ref)))
