"""Two releases side by side: recipe, data, base, scores, failure cases and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub.packaging.adapter import WEIGHTS_NAME, read_adapter
from adapterhub.packaging.behaviour import Change, Level, demanded, find_changes
from adapterhub.packaging.deltas import LayerDelta, layer_deltas
from adapterhub.packaging.evidence import (
    SCORES,
    FailureCase,
    Score,
    ScoresEvidence,
    read_evidence,
    read_failures,
)
from adapterhub.packaging.manifest import DatasetLock
from adapterhub.packaging.release import Release


@dataclass(frozen=True)
class Setting:
    """A key that differs, dotted where it is nested; a value is None where the key is missing."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class ScorePair:
    """One metric in both releases; None where it was not measured."""

    metric: str
    a: Score | None
    b: Score | None


@dataclass(frozen=True)
class Measured:
    """The scores of both, and whether they can be held against each other."""

    pairs: tuple[ScorePair, ...]
    alike: bool
    """The same rows, answered with the same decoding, each by the release's own weights."""
    why_not: str | None
    """Why they are not alike, in words."""


@dataclass(frozen=True)
class Cases:
    """The recorded failure cases of both, told apart by question and check."""

    fixed: tuple[FailureCase, ...]
    """A fails them; B was asked the same and does not."""
    new: tuple[FailureCase, ...]
    """B fails them; A was asked the same and does not."""
    still: tuple[FailureCase, ...]
    """Both fail them, as B answers."""
    only_a: tuple[FailureCase, ...]
    """Recorded in A alone, and nothing shows that B was asked."""
    only_b: tuple[FailureCase, ...]


@dataclass(frozen=True)
class WeightDelta:
    """How far the weights are apart."""

    same_file: bool
    """The weight files are the same bytes."""
    layers: tuple[LayerDelta, ...]
    """In the order of the adapter's file; empty when the files are the same, or no updates can be told."""
    relative: float | None
    """‖ΔB − ΔA‖ / ‖ΔA‖ over all layers together (Frobenius); None when a layer cannot be compared."""
    note: str | None
    """What the norms leave out, or why there are none."""


@dataclass(frozen=True)
class Comparison:
    """Everything ``adapterhub diff`` tells."""

    a: Release
    b: Release
    changes: tuple[Change, ...]
    level: Level | None
    """What the changes from A to B ask of the next version; None when there are none."""
    base: tuple[Setting, ...]
    recipe: tuple[Setting, ...]
    data: tuple[Setting, ...]
    """By split and key, like ``train.rows``."""
    scores: Measured
    failures: Cases
    weights: WeightDelta


def compare(a: Release, b: Release) -> Comparison:
    """Hold release ``b`` against ``a``, whose files the caller has checked; nothing is loaded.

    Raises ReleaseError for an adapter whose configuration or tensors are unsound, ManifestError for malformed
    evidence.
    """
    changes = find_changes(a, b)
    bases = [release.manifest.base.model_dump() if release.manifest.base else None for release in (a, b)]
    scores = _compare_scores(a, b)
    return Comparison(
        a=a,
        b=b,
        changes=changes,
        level=demanded(changes),
        base=tuple(_differing(*bases)),
        recipe=tuple(_differing(a.manifest.recipe, b.manifest.recipe)),
        data=tuple(_differing(_by_split(a.manifest.datasets), _by_split(b.manifest.datasets))),
        scores=scores,
        failures=_compare_failures(a, b, asked_alike=scores.alike),
        weights=_compare_weights(a, b),
    )


def _differing(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> Iterator[Setting]:
    ours, theirs = dict(_flatten(a or {})), dict(_flatten(b or {}))
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            yield Setting(key, ours.get(key), theirs.get(key))


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _by_split(datasets: tuple[DatasetLock, ...]) -> dict[str, Any]:
    """Each split's record; of several sets in one split, the second is ``train 2`` and so on."""
    found: dict[str, Any] = {}
    for data in datasets:
        count = sum(name.partition(" ")[0] == data.split for name in found)
        found[f"{data.split} {count + 1}" if count else data.split] = data.model_dump(exclude={"split"})
    return found


def _compare_scores(a: Release, b: Release) -> Measured:
    ours, theirs = (read_evidence(release.path, SCORES, ScoresEvidence) for release in (a, b))
    by_name = [{score.metric: score for score in found.scores} if found else {} for found in (ours, theirs)]
    pairs = tuple(
        ScorePair(metric, by_name[0].get(metric), by_name[1].get(metric))
        for metric in dict.fromkeys([*by_name[0], *by_name[1]])
    )
    why_not = _why_not_alike(a, b, ours, theirs)
    return Measured(pairs, why_not is None, why_not)


def _why_not_alike(
    a: Release, b: Release, ours: ScoresEvidence | None, theirs: ScoresEvidence | None
) -> str | None:
    if ours is None or theirs is None:
        missing = [name for name, found in (("A", ours), ("B", theirs)) if found is None]
        return f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not measured"
    for name, release, found in (("A", a, ours), ("B", b, theirs)):
        weights = release.manifest.files.get(WEIGHTS_NAME)
        if weights is None or weights.sha256 != found.adapter_sha256:
            return f"the scores in {name} are of other weights than it holds"
    if ours.data.sha256 != theirs.data.sha256:
        return f"measured on other rows ({ours.data.rows} and {theirs.data.rows})"
    if _without_batch(ours.decoding) != _without_batch(theirs.decoding):
        return "answered with another decoding"
    return None


def _without_batch(decoding: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in decoding.items() if key != "batch_size"}


def _compare_failures(a: Release, b: Release, *, asked_alike: bool) -> Cases:
    """``asked_alike``: both were asked the same rows, so that what only one records, the other answers right.

    A case that a person added is not among the rows: whether the other release was asked is not known.
    """
    ours, theirs = ({case.id: case for case in read_failures(release.path) or ()} for release in (a, b))
    gone = [case for case in ours.values() if case.id not in theirs]
    come = [case for case in theirs.values() if case.id not in ours]

    def is_told(case: FailureCase) -> bool:
        return asked_alike and not case.added

    return Cases(
        fixed=tuple(case for case in gone if is_told(case)),
        new=tuple(case for case in come if is_told(case)),
        still=tuple(case for case in theirs.values() if case.id in ours),
        only_a=tuple(case for case in gone if not is_told(case)),
        only_b=tuple(case for case in come if not is_told(case)),
    )


def _compare_weights(a: Release, b: Release) -> WeightDelta:
    ours, theirs = _weight_files(a), _weight_files(b)
    if a.manifest.kind != "adapter" or b.manifest.kind != "adapter":
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        words = f"other files: {', '.join(differing)}" if differing else None
        return WeightDelta(not differing, (), None, words)
    adapters = read_adapter(a.path), read_adapter(b.path)
    same = ours == theirs and adapters[0].config == adapters[1].config
    if same:
        return WeightDelta(True, (), 0.0, None)
    layers = tuple(layer_deltas(*adapters))
    return WeightDelta(False, layers, _overall(layers), _left_out(adapters))


def _weight_files(release: Release) -> dict[str, str]:
    return {
        name: entry.sha256 for name, entry in release.manifest.files.items() if name.endswith(".safetensors")
    }


def _overall(layers: tuple[LayerDelta, ...]) -> float | None:
    total = math.sqrt(sum(layer.norm_a**2 for layer in layers))
    if not total or any(layer.delta is None for layer in layers):
        return None
    return math.sqrt(sum((layer.delta or 0.0) ** 2 for layer in layers)) / total


def _left_out(adapters: tuple[Any, ...]) -> str | None:
    """What of the adapters s·B·A does not tell."""
    found = dict.fromkeys(obstacle for adapter in adapters for obstacle in adapter.config.obstacles())
    others = sum(len(adapter.others) for adapter in adapters)
    if others:
        found[f"{others} tensors that are no LoRA factor"] = None
    return f"not in these norms: {', '.join(found)}" if found else None
