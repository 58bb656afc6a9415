"""evidence/changes.json: what became better and worse since an earlier version of the same release."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from adapterhub.packaging.evidence import Finding
from adapterhub.packaging.manifest import Frozen, Parent, SemVer, Sha256

CHANGES = "evidence/changes.json"


class ChangedPart(Frozen):
    """One thing that differs from the earlier version."""

    part: str
    """Like ``base``, ``weights`` or ``records``."""
    what: str
    """In words."""


class ChangedScore(Frozen):
    """One metric of both versions' adapters."""

    metric: str
    before: float | None
    """None: not measured."""
    before_interval: tuple[float, float] | None = None
    """95 %."""
    after: float | None
    after_interval: tuple[float, float] | None = None


class ChangedCase(Frozen):
    """A failure case that is recorded in one version or both."""

    id: str
    failure_class: str
    question: str
    """The last message of its prompt, cut to 200 characters."""


class ChangesEvidence(Frozen):
    """This version held against an earlier one, by what is recorded in both."""

    schema_version: Literal[1] = 1
    since: Parent
    """The earlier version."""
    since_version: SemVer
    adapter_sha256: Sha256
    """Of this version's adapter_model.safetensors."""
    parts: tuple[ChangedPart, ...]
    asked_alike: bool
    """Both were asked the same rows with the same decoding."""
    why_not: str | None = None
    """Why they were not, in words."""
    scores: tuple[ChangedScore, ...] = ()
    fixed: tuple[ChangedCase, ...] = ()
    """The earlier version fails them, this one was asked the same and does not."""
    regressed: tuple[ChangedCase, ...] = ()
    """The other way round."""
    still: tuple[ChangedCase, ...] = ()
    """Both fail them."""
    new: tuple[ChangedCase, ...] = ()
    """This version fails them, and nothing shows that the earlier one was asked."""
    not_asked: tuple[ChangedCase, ...] = ()
    """The earlier version fails them, and nothing shows that this one was asked."""
    p_value: Annotated[float, Field(ge=0, le=1)] | None = None
    """McNemar's exact test of fixed against regressed, two-sided; None where rows differ."""
    verdict: Finding | None = None
    """What it shows of this version at 5 %."""
