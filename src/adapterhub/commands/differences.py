"""diff."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.fields import print_fields
from adapterhub.commands.targets import open_checked

if TYPE_CHECKING:
    from adapterhub.packaging.comparison import Comparison, Measured, WeightDelta
    from adapterhub.packaging.deltas import LayerDelta
    from adapterhub.packaging.evidence import FailureCase, Score
    from adapterhub.packaging.release import Release

_LAYERS_SHOWN = 10
_CASES_SHOWN = 10
_VALUE_CHARS = 60


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON document.")
def diff_command(a: str, b: str, endpoint: str | None, as_json: bool) -> None:
    """Say what changed from release A to release B: folders, or owner/name[@version] on the Hub.

    Recipe, data, base, template, tokens, scores, failure cases fixed and new, the change of the weights by
    layer, and what it all asks of the version. A case counts as fixed or new only where both were asked it.
    """
    from adapterhub.packaging.comparison import compare

    comparison = compare(open_checked(a, endpoint), open_checked(b, endpoint))
    if as_json:
        click.echo(json.dumps(_comparison_json(comparison), indent=2, ensure_ascii=False, allow_nan=False))
        return
    print_fields(_comparison_lines(comparison))


def _comparison_json(found: Comparison) -> dict[str, Any]:
    return {
        "a": _release_json(found.a),
        "b": _release_json(found.b),
        "demands": found.level,
        "changes": [asdict(change) for change in found.changes],
        "base": [asdict(setting) for setting in found.base],
        "recipe": [asdict(setting) for setting in found.recipe],
        "data": [asdict(setting) for setting in found.data],
        "scores": {
            "comparable": found.scores.alike,
            "why_not": found.scores.why_not,
            "metrics": [
                {
                    "metric": pair.metric,
                    "a": pair.a and pair.a.model_dump(mode="json"),
                    "b": pair.b and pair.b.model_dump(mode="json"),
                }
                for pair in found.scores.pairs
            ],
        },
        "failures": {
            name: [case.model_dump(mode="json") for case in getattr(found.failures, name)]
            for name in ("fixed", "new", "still", "only_a", "only_b")
        },
        "weights": {
            "same_file": found.weights.same_file,
            "relative": _finite(found.weights.relative),
            "note": found.weights.note,
            "layers": [
                {
                    "module": layer.module,
                    "norm_a": _finite(layer.norm_a),
                    "norm_b": _finite(layer.norm_b),
                    "delta": _finite(layer.delta),
                    "relative": _finite(layer.relative),
                }
                for layer in found.weights.layers
            ],
        },
    }


def _release_json(release: Release) -> dict[str, Any]:
    manifest = release.manifest
    return {
        "path": str(release.path),
        "name": manifest.name,
        "version": manifest.version,
        "kind": manifest.kind,
        "digest": release.digest,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _comparison_lines(found: Comparison) -> Iterator[tuple[str, str]]:
    for side, release in (("A", found.a), ("B", found.b)):
        manifest = release.manifest
        yield side, f"{manifest.name} {manifest.version}, {manifest.kind}, digest {release.digest}"
    yield "demands", found.level or "nothing: no difference in files, base, task or records"
    for change in found.changes:
        yield "", f"{change.level:<5}  {change.part}: {change.what}"
    for label, settings in (("base", found.base), ("recipe", found.recipe), ("data", found.data)):
        if not settings:
            yield label, "the same"
        for index, setting in enumerate(settings):
            yield "" if index else label, f"{setting.key}  {_value(setting.a)} → {_value(setting.b)}"
    yield from _score_lines(found.scores)
    yield from _failure_lines(found)
    yield from _weight_lines(found.weights)


def _score_lines(measured: Measured) -> Iterator[tuple[str, str]]:
    from adapterhub.cards.formats import METRICS, interval_of, value_of

    def side(score: Score | None) -> str:
        if score is None:
            return "not measured"
        return f"{value_of(score, score.adapter)} ({interval_of(score, score.adapter_interval)})"

    for index, pair in enumerate(measured.pairs):
        rows = {score.rows for score in (pair.a, pair.b) if score}
        text = f"{METRICS[pair.metric]}  {side(pair.a)} → {side(pair.b)}, {' and '.join(map(str, rows))} rows"
        yield "" if index else "scores", text
    if measured.why_not:
        yield "" if measured.pairs else "scores", f"not comparable: {measured.why_not}"


def _failure_lines(found: Comparison) -> Iterator[tuple[str, str]]:
    cases = found.failures
    counts = f"{len(cases.fixed)} fixed, {len(cases.new)} new, {len(cases.still)} in both"
    yield "failures", counts
    for word, group in (("fixed", cases.fixed), ("new", cases.new)):
        yield from (("", line) for line in _case_lines(word, group))
    alone = len(cases.only_a) + len(cases.only_b)
    if alone:
        words = (
            f"{len(cases.only_a)} in A alone, {len(cases.only_b)} in B alone: the other was not asked them"
        )
        yield "", f"{words}; `adapterhub failures run B --cases A` asks"


def _case_lines(word: str, cases: tuple[FailureCase, ...]) -> Iterator[str]:
    for case in cases[:_CASES_SHOWN]:
        asked = case.messages[-1]["content"] if case.messages else ""
        yield f"{word:<5}  {case.id}  {_short(asked)}"
    if len(cases) > _CASES_SHOWN:
        yield f"and {len(cases) - _CASES_SHOWN} more {word}: --json has them"


def _weight_lines(weights: WeightDelta) -> Iterator[tuple[str, str]]:
    if weights.same_file:
        yield "weights", "the same"
    elif weights.layers:
        overall = "not told" if weights.relative is None else f"{weights.relative:.4g}"
        yield (
            "weights",
            f"change of the updates s·B·A, ‖ΔB − ΔA‖ / ‖ΔA‖ over {len(weights.layers)} layers: {overall}",
        )
    if weights.note:
        yield "" if weights.layers else "weights", weights.note
    ranked = sorted(weights.layers, key=_most_changed)
    for layer in ranked[:_LAYERS_SHOWN]:
        relative = "other shape" if layer.delta is None else _figure(layer.relative)
        yield "", f"{relative:>11}  ‖ΔA‖ {layer.norm_a:.4g}, ‖ΔB‖ {layer.norm_b:.4g}  {layer.module}"
    if len(ranked) > _LAYERS_SHOWN:
        yield "", f"and {len(ranked) - _LAYERS_SHOWN} layers that changed less: --json has them"


def _most_changed(layer: LayerDelta) -> float:
    """Sorts what cannot be compared, or only B changes, before all."""
    relative = layer.relative
    return -math.inf if relative is None or math.isnan(relative) else -relative


def _figure(relative: float | None) -> str:
    return "only in B" if relative is None else f"{relative:.4g}"


def _value(value: Any) -> str:
    return "not there" if value is None else _short(str(value))


def _short(text: str) -> str:
    from adapterhub.cards.escaping import one_line

    text = one_line(text)
    return text if len(text) <= _VALUE_CHARS else f"{text[: _VALUE_CHARS - 1]}…"
