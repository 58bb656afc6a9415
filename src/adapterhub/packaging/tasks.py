"""evidence/tasks.json: benchmarks through lm-eval, the base beside the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from adapterhub.packaging.evidence import Finding, read_evidence
from adapterhub.packaging.manifest import BaseMismatch, Frozen, Hardware, Sha256

TASKS = "evidence/tasks.json"


class TaskScore(Frozen):
    """One metric of one task on both sides."""

    task: str
    """lm-eval's name of it."""
    version: str
    """The task's own version, as lm-eval gives it."""
    task_hash: str
    """lm-eval's hash over the questions that were asked, the same on both sides."""
    metric: str
    """lm-eval's name, like ``acc_norm``."""
    filter: str
    """lm-eval's filter of the answers; ``none`` where there is none."""
    higher_is_better: bool | None = None
    """None: the task does not say."""
    few_shot: Annotated[int, Field(ge=0)]
    """Examples before each question."""
    questions: Annotated[int, Field(ge=1)]
    base: float
    adapter: float
    base_error: float | None = None
    """Standard error as lm-eval computes it; None where it gives none."""
    adapter_error: float | None = None
    base_interval: tuple[float, float] | None = None
    """95 %, Wilson; only of a metric that is 0 or 1 for each question."""
    adapter_interval: tuple[float, float] | None = None
    gained: Annotated[int, Field(ge=0)] | None = None
    """Questions that only the adapter gets right; None where the metric is not 0 or 1 for each."""
    lost: Annotated[int, Field(ge=0)] | None = None
    p_value: Annotated[float, Field(ge=0, le=1)] | None = None
    """McNemar's exact test of gained against lost, two-sided; None where there is nothing to test."""
    p_adjusted: Annotated[float, Field(ge=0, le=1)] | None = None
    """After Holm's correction for all tested scores of the file."""
    contaminated: Annotated[int, Field(ge=0)] | None = None
    """Questions that share 13 words in a row with a training row; None: not looked for."""
    verdict: Finding | None = None
    """``better`` or ``worse`` only where ``p_adjusted`` is below 0.05; None where nothing was tested."""


class TasksEvidence(Frozen):
    """All benchmarks of one measurement."""

    schema_version: Literal[1] = 1
    adapter_sha256: Sha256
    """Of adapter_model.safetensors that was measured."""
    lm_eval: str
    """Its version."""
    scores: Annotated[tuple[TaskScore, ...], Field(min_length=1)]
    settings: dict[str, Any]
    """What lm-eval was asked for: limit, batch size, chat template, seeds."""
    base_mismatch: BaseMismatch | None = None
    """The base that was measured on, if it is not the one trained on, and why it was allowed."""
    tools: dict[str, str] = Field(default_factory=dict)
    """Package name to version."""
    hardware: Hardware
    seconds: float
    """Wall time of both sides, without loading."""


def read_tasks(folder: Path) -> TasksEvidence | None:
    """The benchmarks of a release folder, or None when none were run. Raises ManifestError when malformed."""
    return read_evidence(folder, TASKS, TasksEvidence)
