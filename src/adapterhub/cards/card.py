"""The model of a card: what a release's manifest and evidence say, checked and put together, nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub.cards.failures import count_classes, is_regression, worst_first
from adapterhub.cards.licences import Licensing, find_licensing
from adapterhub.cards.words import Words, read_words
from adapterhub.errors import ManifestError, ReleaseError
from adapterhub.packaging.adapter import read_adapter
from adapterhub.packaging.base import WEIGHT_SUFFIX, base_digest
from adapterhub.packaging.changes import CHANGES, ChangesEvidence
from adapterhub.packaging.evidence import (
    CURVE,
    FAILURES,
    FIDELITY,
    LEDGER,
    ROUNDING,
    SCORES,
    CurveEvidence,
    CurvePoint,
    FailureCase,
    FidelityEvidence,
    LedgerEvidence,
    RoundingEvidence,
    Score,
    ScoresEvidence,
    read_evidence,
    read_failures,
)
from adapterhub.packaging.manifest import BaseLock, DatasetLock, Manifest
from adapterhub.packaging.precisions import PRECISIONS, PrecisionsEvidence, read_precisions
from adapterhub.packaging.probes import PROBES, ProbesEvidence, read_probes
from adapterhub.packaging.release import Release
from adapterhub.packaging.retarget import RETARGET, RetargetEvidence, read_retarget
from adapterhub.packaging.serving import vllm_obstacles
from adapterhub.packaging.tasks import TASKS, TasksEvidence, read_tasks

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SOURCES = (
    ADAPTER_CONFIG, SCORES, CURVE, LEDGER, FAILURES, PROBES, TASKS, PRECISIONS, FIDELITY, ROUNDING, RETARGET,
    CHANGES,
)  # fmt: skip
"""What a card is made from, beside the manifest and its author's words."""
WORST_SHOWN = 3
_CURVE_ROWS = 10
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$", re.ASCII)


class AdapterFacts(BaseModel):
    """What adapter_config.json says of the adapter's shape; PEFT's names."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    r: int = Field(ge=1)
    """Rank."""
    lora_alpha: float
    """The update is scaled by alpha / rank."""
    target_modules: frozenset[str] | str | None = None
    """Names of the layers that have an adapter."""
    trainable_token_indices: dict[str, list[int]] | list[int] | None = None
    """Rows of embeddings and head that the adapter fills, by module."""

    @property
    def token_rows(self) -> int:
        """How many rows the embeddings need for the tokens that the adapter trains; 0: it trains none."""
        listed = self.trainable_token_indices or []
        numbers = [row for rows in listed.values() for row in rows] if isinstance(listed, dict) else listed
        return max(numbers, default=-1) + 1


@dataclass(frozen=True)
class Card:
    """Everything a card prints. A part that is None was not measured, or not recorded."""

    manifest: Manifest
    adapter: AdapterFacts | None
    scores: ScoresEvidence | None
    curve: CurveEvidence | None
    ledger: LedgerEvidence | None
    failures: tuple[FailureCase, ...] | None
    probes: ProbesEvidence | None
    tasks: TasksEvidence | None
    precisions: PrecisionsEvidence | None
    fidelity: FidelityEvidence | None
    rounding: RoundingEvidence | None
    retarget: RetargetEvidence | None
    """None: the adapter was not re-fitted for another base."""
    changes: ChangesEvidence | None
    words: Words
    """The author's own."""
    vllm_obstacles: tuple[str, ...] | None
    """What of an adapter vLLM would refuse or compute wrong; None without its weights: not known."""

    @property
    def base(self) -> BaseLock:
        """The base model; ``read_card`` refuses releases without one."""
        assert self.manifest.base is not None
        return self.manifest.base

    @property
    def folder(self) -> str:
        """How commands and snippets name the release's folder."""
        return f"./{self.manifest.name}"

    @property
    def weights_bytes(self) -> int:
        """Bytes of the release's weight files."""
        return sum(e.size for name, e in self.manifest.files.items() if name.endswith(".safetensors"))

    @property
    def target_modules(self) -> list[str]:
        """Names of the adapted modules, sorted; of full paths the last part, alike in every layer."""
        targets = self.adapter.target_modules if self.adapter else None
        if isinstance(targets, str):
            return [targets]
        return sorted({target.rpartition(".")[2] for target in targets or ()})

    @property
    def base_on_hub(self) -> str | None:
        """The base's Hub name; None when it has none."""
        return self.base.name if is_hub_name(self.base.name) else None

    @cached_property
    def licensing(self) -> Licensing:
        """The licence it goes by, and what speaks against it."""
        return find_licensing(self.manifest)

    def rows(self, split: str) -> list[DatasetLock]:
        """The data sets of one split, ``train`` or ``test``."""
        return [data for data in self.manifest.datasets if data.split == split]

    def score(self, metric: str) -> Score | None:
        """The score of one metric, or None when it was not measured."""
        return next((s for s in self.scores.scores if s.metric == metric), None) if self.scores else None

    @property
    def measured_on_training_rows(self) -> bool:
        """Whether the scored rows are, row for row, those that were trained on."""
        trained = {data.sha256 for data in self.rows("train")}
        return self.scores is not None and self.scores.data.sha256 in trained

    @cached_property
    def failure_classes(self) -> dict[str, int]:
        """How many recorded cases each class has, most frequent first."""
        return count_classes(self.failures or ())

    @cached_property
    def regressions(self) -> int:
        """Recorded cases that the base answers right."""
        return sum(is_regression(case) for case in self.failures or ())

    @cached_property
    def worst(self) -> list[FailureCase]:
        """The cases that are shown whole."""
        return worst_first(self.failures or ())[:WORST_SHOWN]

    @property
    def curve_rows(self) -> list[CurvePoint]:
        """The points of the curve that a table shows: first, last, held-out losses, or evenly spread ones."""
        return thin_out(self.curve.points, _CURVE_ROWS) if self.curve else []


def read_card(release: Release) -> Card:
    """Put a card together from a release's manifest and the evidence that it lists.

    Raises SignatureError for a listed file that is missing or changed, ManifestError for a malformed one, and
    ReleaseError for evidence that is not listed or was measured on another adapter, and for data sets.
    """
    manifest = release.manifest
    if manifest.base is None:
        raise ReleaseError(
            f"{release.path} is a {manifest.kind} release without a base model",
            "name a release of an adapter or a model; cards are made for those",
        )
    _check_sources(release)
    folder = release.path
    card = Card(
        manifest=manifest,
        adapter=_read_adapter(folder),
        scores=read_evidence(folder, SCORES, ScoresEvidence),
        curve=read_evidence(folder, CURVE, CurveEvidence),
        ledger=read_evidence(folder, LEDGER, LedgerEvidence),
        failures=read_failures(folder),
        probes=read_probes(folder),
        tasks=read_tasks(folder),
        precisions=read_precisions(folder),
        fidelity=read_evidence(folder, FIDELITY, FidelityEvidence),
        rounding=read_evidence(folder, ROUNDING, RoundingEvidence),
        retarget=read_retarget(folder),
        changes=read_evidence(folder, CHANGES, ChangesEvidence),
        words=read_words(folder),
        vllm_obstacles=_find_obstacles(folder),
    )
    measured = {
        SCORES: card.scores,
        PROBES: card.probes,
        TASKS: card.tasks,
        PRECISIONS: card.precisions,
        CHANGES: card.changes,
    }
    for name, evidence in measured.items():
        if evidence is not None:
            _check_measured(release, name, evidence.adapter_sha256)
    _check_retarget(release, card.retarget)
    _check_fidelity(release, card.fidelity)
    return card


def is_hub_name(name: str) -> bool:
    """Whether ``name`` is ``owner/name`` by the Hub's rules."""
    return bool(_HUB_NAME.match(name)) and "--" not in name and ".." not in name


def thin_out(points: Sequence[CurvePoint], limit: int) -> list[CurvePoint]:
    """At most ``limit`` (3 or more) of ``points``: first, last, and those with held-out losses between."""
    if len(points) <= limit:
        return list(points)
    inner = points[1:-1]
    wanted = [point for point in inner if point.eval_loss is not None] or list(inner)
    stride = math.ceil(len(wanted) / (limit - 2))
    return [points[0], *wanted[stride - 1 :: stride], points[-1]]


def _find_obstacles(folder: Path) -> tuple[str, ...] | None:
    if not (folder / ADAPTER_CONFIG).is_file():
        return ()
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return None
    return tuple(vllm_obstacles(read_adapter(folder)))


def _check_sources(release: Release) -> None:
    """Every file a card reads must be the one the manifest lists."""
    present = [name for name in SOURCES if name in release.manifest.files or (release.path / name).exists()]
    unlisted = [name for name in present if name not in release.manifest.files]
    if unlisted:
        raise ReleaseError(
            f"{release.path / unlisted[0]} is not listed in the release's manifest",
            "make that evidence again with `adapterhub eval`, or remove the file",
        )
    release.check_files(present)


def _check_measured(release: Release, name: str, adapter_sha256: str) -> None:
    """Evidence about an adapter must be about this one."""
    weights = release.manifest.files.get(ADAPTER_WEIGHTS)
    if weights is None or adapter_sha256 == weights.sha256:
        return
    raise ReleaseError(
        f"{release.path / name} was measured on another adapter (sha256 {adapter_sha256[:12]}…, "
        f"this one is {weights.sha256[:12]}…)",
        "measure this one: adapterhub eval RELEASE --data FILE.jsonl",
    )


def _check_retarget(release: Release, retarget: RetargetEvidence | None) -> None:
    weights = release.manifest.files.get(ADAPTER_WEIGHTS)
    if retarget is None or weights is None or retarget.adapter_sha256 == weights.sha256:
        return
    raise ReleaseError(
        f"{release.path / RETARGET} is of another adapter than this release holds",
        "re-fit it again: adapterhub retarget RELEASE --base BASE --out DIR",
    )


def _check_fidelity(release: Release, fidelity: FidelityEvidence | None) -> None:
    files = release.manifest.files.items()
    weights = {
        name: entry.sha256 for name, entry in files if name.endswith(WEIGHT_SUFFIX) and "/" not in name
    }
    if fidelity is None or fidelity.weights_digest == base_digest(weights):
        return
    raise ReleaseError(
        f"{release.path / FIDELITY} was measured on other weights than the release holds",
        "measure these: adapterhub fidelity A RELEASE --text FILE",
    )


def _read_adapter(folder: Path) -> AdapterFacts | None:
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        return AdapterFacts.model_validate_json(path.read_bytes())
    except ValidationError as err:
        key = ".".join(str(part) for part in err.errors()[0]["loc"])
        raise ManifestError(f"{path}: {key}: {err.errors()[0]['msg']}", "take the release again") from err
