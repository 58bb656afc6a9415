"""evidence/precisions.json: base in 16 bits, base in 4 bits, adapter on 4 bits, on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from adapterhub.packaging.evidence import Finding, read_evidence
from adapterhub.packaging.manifest import BaseMismatch, DatasetLock, Frozen, Hardware, Sha256

PRECISIONS = "evidence/precisions.json"

Side = Literal["base_16_bit", "base_quantized", "adapter"]
"""The adapter stands on the quantized base."""


class SideFigures(Frozen):
    """What one side scores."""

    side: Side
    exact: Annotated[int, Field(ge=0)]
    """Rows answered exactly."""
    exact_match: Annotated[float, Field(ge=0, le=1)]
    exact_match_interval: tuple[float, float]
    """95 %, Wilson."""
    loss: float
    """Nats a token over the rows' assistant tokens."""
    loss_interval: tuple[float, float] | None
    """95 %, rows as clusters; None for one row."""
    perplexity: float
    """exp(``loss``)."""
    bits_per_byte: float
    """Of the assistant's text in UTF-8, so that tokenizers compare."""


class SideDifference(Frozen):
    """One side minus another, row by row."""

    of: Side
    minus: Side
    loss: float
    """Nats a token; below 0: ``of`` is better."""
    loss_interval: tuple[float, float] | None
    """95 % of the paired difference, rows as clusters; None for one row."""
    loss_verdict: Finding | None
    """What that interval shows of ``of``; None for one row."""
    exact_match: float
    """Share of rows; above 0: ``of`` is better."""
    exact_match_p_value: Annotated[float, Field(ge=0, le=1)]
    """McNemar's exact test, two-sided."""
    exact_match_verdict: Finding


class PrecisionsEvidence(Frozen):
    """What the quantization cost, and what training bought back."""

    schema_version: Literal[1] = 1
    adapter_sha256: Sha256
    """Of adapter_model.safetensors that was measured."""
    quantization: str
    """In words, like ``nf4, double, blocks of 64``."""
    data: DatasetLock
    rows: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    """Assistant tokens that the losses are the means over."""
    text_bytes: Annotated[int, Field(ge=1)]
    """UTF-8 bytes of the assistant's text in those rows."""
    sides: tuple[SideFigures, SideFigures, SideFigures]
    """base_16_bit, base_quantized, adapter."""
    cost: SideDifference
    """base_quantized minus base_16_bit."""
    bought: SideDifference
    """adapter minus base_quantized."""
    net: SideDifference
    """adapter minus base_16_bit."""
    decoding: dict[str, Any]
    limit: Annotated[int, Field(ge=1)] | None = None
    left_out: Annotated[int, Field(ge=0)] = 0
    base_mismatch: BaseMismatch | None = None
    """The base that was measured on, if it is not the one trained on, and why it was allowed."""
    tools: dict[str, str] = Field(default_factory=dict)
    hardware: Hardware
    seconds: float
    """Wall time of all three sides, without loading."""


def read_precisions(folder: Path) -> PrecisionsEvidence | None:
    """The comparison of a release folder, or None when it was not made; ManifestError when malformed."""
    return read_evidence(folder, PRECISIONS, PrecisionsEvidence)
