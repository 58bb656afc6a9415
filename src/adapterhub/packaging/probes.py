"""evidence/probes.json: what base and adapter answered to the same probes, and what that shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from adapterhub.packaging.evidence import Finding, read_evidence
from adapterhub.packaging.manifest import BaseMismatch, Frozen, Hardware, Sha256

PROBES = "evidence/probes.json"

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ProbeSuite(Frozen):
    """Probes that were asked, and where they come from."""

    source: str
    """``built in``, or the file's name."""
    seed: int | None = None
    """What the built-in probes were generated from; None for a file."""
    sha256: Sha256
    """Over the probes that were asked, in order: see docs/evidence.md."""
    probes: Annotated[int, Field(ge=1)]


class ProbeScore(Frozen):
    """One class of probes (and one tier of it, if it has any): both sides on the same questions."""

    probe_class: str
    """Like ``suggestibility``."""
    tier: str | None = None
    """A part of the class that is scored alone, like ``obscure`` or ``should refuse``."""
    probes: Annotated[int, Field(ge=1)]
    base_passed: Count
    adapter_passed: Count
    base: Share
    adapter: Share
    base_interval: tuple[float, float]
    """95 %, Wilson."""
    adapter_interval: tuple[float, float]
    gained: Count
    """Probes that only the adapter passes."""
    lost: Count
    """Probes that only the base passes."""
    p_value: Share
    """McNemar's exact test of gained against lost, two-sided."""
    p_adjusted: Share
    """``p_value`` after Holm's correction for all scores of this file."""
    verdict: Finding
    """``better`` or ``worse`` only where ``p_adjusted`` is below 0.05."""
    base_unfinished: Count
    """Answers that ran into the token limit."""
    adapter_unfinished: Count
    base_empty: Count
    """Answers of nothing but white space."""
    adapter_empty: Count


class ProbeAnswer(Frozen):
    """What one side said."""

    text: str
    finished: bool
    """Whether it ended by itself, rather than at the token limit."""
    passed: bool


class ProbeOutcome(Frozen):
    """One probe, asked of both sides."""

    id: str
    probe_class: str
    tier: str | None = None
    messages: tuple[dict[str, str], ...]
    """``role`` and ``content``."""
    check: dict[str, Any]
    max_new_tokens: Annotated[int, Field(ge=1)]
    base: ProbeAnswer
    adapter: ProbeAnswer


class ProbesEvidence(Frozen):
    """All probes of one measurement."""

    schema_version: Literal[1] = 1
    adapter_sha256: Sha256
    """Of adapter_model.safetensors that was measured."""
    suites: Annotated[tuple[ProbeSuite, ...], Field(min_length=1)]
    decoding: dict[str, Any]
    """Greedy; batch size; the tokens that end an answer. Each outcome has its own limit of tokens."""
    scores: Annotated[tuple[ProbeScore, ...], Field(min_length=1)]
    outcomes: tuple[ProbeOutcome, ...]
    left_out: Count = 0
    """Probes that do not fit the base's context."""
    base_mismatch: BaseMismatch | None = None
    """The base that was measured on, if it is not the one trained on, and why it was allowed."""
    tools: dict[str, str] = Field(default_factory=dict)
    """Package name to version, of what generated and scored."""
    hardware: Hardware
    seconds: float
    """Wall time of answering, without loading."""


def read_probes(folder: Path) -> ProbesEvidence | None:
    """The probes of a release folder, or None when none were asked ("not measured").

    Raises ManifestError when the file is malformed or its scores do not follow from its outcomes.
    """
    evidence = read_evidence(folder, PROBES, ProbesEvidence)
    if evidence is not None:
        _check_counts(folder, evidence)
    return evidence


def failing(outcomes: Sequence[ProbeOutcome]) -> list[ProbeOutcome]:
    """What the adapter fails."""
    return [outcome for outcome in outcomes if not outcome.adapter.passed]


def _check_counts(folder: Path, evidence: ProbesEvidence) -> None:
    """A score that its outcomes do not bear out was edited."""
    from adapterhub.errors import ManifestError

    for score in evidence.scores:
        key = (score.probe_class, score.tier)
        asked = [o for o in evidence.outcomes if (o.probe_class, o.tier) == key]
        counted = (
            len(asked),
            sum(o.base.passed for o in asked),
            sum(o.adapter.passed for o in asked),
            sum(o.adapter.passed and not o.base.passed for o in asked),
            sum(o.base.passed and not o.adapter.passed for o in asked),
        )
        if counted != (score.probes, score.base_passed, score.adapter_passed, score.gained, score.lost):
            name = score.probe_class + (f", {score.tier}" if score.tier else "")
            raise ManifestError(
                f"{folder / PROBES}: the score of {name} does not follow from the outcomes in the same file",
                "measure again: adapterhub eval RELEASE --probes all",
            )
