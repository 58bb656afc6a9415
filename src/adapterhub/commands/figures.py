"""What eval measured, printed: as aligned tables to be read, as one JSON document for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterhub.cards.evaluation import Evaluation
    from adapterhub.cards.tables import Table
    from adapterhub.packaging.evidence import Contamination, FailureCase
    from adapterhub.packaging.precisions import PrecisionsEvidence
    from adapterhub.packaging.probes import ProbesEvidence
    from adapterhub.packaging.release import Release
    from adapterhub.packaging.tasks import TasksEvidence


@dataclass
class Measurement:
    """What came out; a part that was not asked for is None."""

    failures: tuple[FailureCase, ...]
    """All that the release records."""
    evaluation: Evaluation | None = None
    precisions: PrecisionsEvidence | None = None
    probes: ProbesEvidence | None = None
    tasks: TasksEvidence | None = None


def as_json(release: Release, measurement: Measurement) -> str:
    """The evidence that was written, scores.json at the top level; probes without their answers."""
    from adapterhub.cards.failures import count_classes
    from adapterhub.packaging.evidence import FAILURES, SCORES
    from adapterhub.packaging.precisions import PRECISIONS
    from adapterhub.packaging.probes import PROBES
    from adapterhub.packaging.tasks import TASKS

    files = []
    document: dict[str, Any] = {"release": str(release.path)}
    if measurement.evaluation:
        document |= measurement.evaluation.scores.model_dump(mode="json")
        files.append(SCORES)
    if measurement.precisions:
        document["precisions"] = measurement.precisions.model_dump(mode="json")
        files.append(PRECISIONS)
    if measurement.probes:
        document["probes"] = measurement.probes.model_dump(mode="json", exclude={"outcomes"})
        files.append(PROBES)
    if measurement.evaluation or measurement.probes:
        failures = measurement.failures
        document["failures"] = {"cases": len(failures), "classes": count_classes(failures)}
        files.append(FAILURES)
    if measurement.tasks:
        document["tasks"] = measurement.tasks.model_dump(mode="json")
        files.append(TASKS)
    return json.dumps(document | {"files": files}, indent=2, ensure_ascii=False)


def as_text(measurement: Measurement) -> str:
    """A table for each part, then the failures."""
    from adapterhub.cards import measurements

    parts = []
    if measurement.evaluation:
        parts.append(_score_table(measurement.evaluation))
    if measurement.precisions:
        parts.append(align_table(measurements.tabulate_precisions(measurement.precisions)))
        parts.append(align_table(measurements.tabulate_differences(measurement.precisions)))
    if measurement.probes:
        parts.append(align_table(measurements.tabulate_probes(measurement.probes)))
    if measurement.tasks:
        parts.append(align_table(measurements.tabulate_tasks(measurement.tasks)))
    if measurement.evaluation or measurement.probes:
        parts.append(count_failures(measurement.failures))
    return "\n\n".join(parts) if len(parts) > 2 else "\n".join(parts)


def count_failures(cases: Sequence[FailureCase]) -> str:
    """``failure cases: 3 (wrong_answer 2, math 1)``."""
    from adapterhub.cards.failures import count_classes

    classes = ", ".join(f"{name} {count}" for name, count in count_classes(cases).items())
    return f"failure cases: {len(cases)}" + (f" ({classes})" if classes else "")


def align(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns as wide as the widest of each: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        (
            line[0].ljust(widths[0])
            + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        ).rstrip()
        for line in lines
    )


def align_table(table: Table) -> str:
    """A card's table for the terminal."""
    from adapterhub.cards.escaping import one_line

    header = [column.name for column in table.columns]
    return align([header, *([one_line(cell.text) for cell in row] for row in table.rows)])


def _score_table(evaluation: Evaluation) -> str:
    """Metric, rows, base and adapter with their intervals, and what the paired test shows."""
    from adapterhub.cards.formats import METRICS, interval_of, value_of

    lines = [("metric", "rows", "base", "95 % interval", "adapter", "95 % interval", "the test shows")]
    for score in evaluation.scores.scores:
        base = (value_of(score, score.base), interval_of(score, score.base_interval))
        adapter = (value_of(score, score.adapter), interval_of(score, score.adapter_interval))
        lines.append((METRICS[score.metric], str(score.rows), *base, *adapter, score.verdict or ""))
    found = evaluation.scores.contamination
    return align(lines) + (f"\n{_describe(found)}" if found else "")


def _describe(found: Contamination) -> str:
    return (
        f"contamination: {found.same_prompts} of these rows have the prompt of a training row, "
        f"{found.shared_sequences} share 13 words in a row with one ({found.train}, {found.train_rows} rows)"
    )
