"""What a folder says of itself: a release, or a plain PEFT adapter. Nothing is loaded, nothing is hashed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import CONFIG_NAME, Adapter, read_adapter
from adapterhub.packaging.evidence import (
    CURVE,
    SCORES,
    CurveEvidence,
    ScoresEvidence,
    read_evidence,
    read_failures,
)
from adapterhub.packaging.files import list_files
from adapterhub.packaging.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from adapterhub.packaging.release import Release, is_unlisted
from adapterhub.packaging.serving import vllm_obstacles, vllm_rank
from adapterhub.packaging.tensors import TensorEntry, read_header

_WEIGHT_SUFFIX = ".safetensors"
_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class AdapterFacts:
    """What the adapter's own files say."""

    parameters: int
    """Trained numbers."""
    modules: int
    """Linear layers that carry factors."""
    targets: tuple[str, ...]
    """The last part of their names, sorted: ``down_proj``, ``q_proj``, …"""
    ranks: tuple[int, ...]
    """Every rank that occurs, ascending."""
    scales: tuple[float, ...]
    """Every s in W + s·B·A that occurs, ascending."""
    dtypes: tuple[str, ...]
    """What the factors are stored as, sorted."""
    base: str | None
    """What adapter_config.json names as the base; no digest binds it."""
    merge_obstacles: tuple[str, ...]
    """Settings that `adapterhub merge` would refuse."""
    vllm_rank: int | None
    """The ``max_lora_rank`` that vLLM needs; None where it has none so high."""
    vllm_obstacles: tuple[str, ...]
    """What vLLM would refuse or compute wrong; empty when it serves the adapter as it is."""


@dataclass(frozen=True)
class FileFacts:
    """One file, listed or found."""

    path: str
    size: int
    """Bytes: as listed in a release, as found in a plain folder."""
    sha256: str | None
    """As listed; None where nothing lists it."""
    state: Literal["as listed", "missing", "other size", "not listed", "found"]
    """By size alone; ``adapterhub verify`` compares contents. ``found``: a plain folder lists nothing."""


@dataclass(frozen=True)
class Inspection:
    """Everything ``adapterhub inspect`` tells."""

    path: Path
    manifest: Manifest | None
    """None for a plain PEFT folder."""
    digest: str | None
    """sha256 of the manifest."""
    adapter: AdapterFacts | None
    """None when the release is no adapter."""
    parameters: int
    """Numbers that all safetensors files stand for, 4-bit ones too."""
    files: tuple[FileFacts, ...]
    signed: bool
    """A signature is there; only ``adapterhub verify`` says whether it holds."""
    scores: ScoresEvidence | None
    """None: not measured."""
    scores_are_of_these_weights: bool | None
    """Whether the scores name the digest of the adapter's weights; None without scores."""
    curve: CurveEvidence | None
    failures: int | None
    """Recorded failure cases; None: none were looked for."""

    @property
    def size(self) -> int:
        """Bytes of all files that are there."""
        return sum(file.size for file in self.files if file.state != "missing")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; ``manifest`` holds adapterhub.json without its list of files."""
        return {
            "path": str(self.path),
            "manifest": self.manifest and self.manifest.model_dump(mode="json", exclude={"files"}),
            "digest": self.digest,
            "adapter": asdict(self.adapter) if self.adapter else None,
            "parameters": self.parameters,
            "bytes": self.size,
            "files": [asdict(file) for file in self.files],
            "signed": self.signed,
            "scores": self.scores and self.scores.model_dump(mode="json"),
            "scores_are_of_these_weights": self.scores_are_of_these_weights,
            "training": self.curve and self.curve.model_dump(mode="json", exclude={"points"}),
            "failure_cases": self.failures,
        }


def inspect_folder(folder: Path) -> Inspection:
    """Look at a release or a plain PEFT adapter.

    Raises ReleaseError when the folder is neither, when a weight file's header is unsound, or when the
    weights are a pickle; ManifestError when the manifest or an evidence file is malformed.
    """
    if not folder.is_dir():
        raise ReleaseError(f"{folder}: no such folder", "check the path, or write owner/name for the Hub")
    manifest = Manifest.read(folder) if (folder / MANIFEST_NAME).is_file() else None
    has_adapter = (folder / CONFIG_NAME).is_file()
    if manifest is None and not has_adapter:
        raise ReleaseError(
            f"{folder} holds neither {MANIFEST_NAME} nor {CONFIG_NAME}",
            "name a release or a PEFT adapter's folder",
        )
    adapter = read_adapter(folder) if has_adapter else None
    files = _listed(folder, manifest) if manifest else _found(folder)
    scores = read_evidence(folder, SCORES, ScoresEvidence)
    failures = read_failures(folder)
    return Inspection(
        path=folder,
        manifest=manifest,
        digest=Release(folder, manifest).digest if manifest else None,
        adapter=_facts(adapter) if adapter else None,
        parameters=_count(folder, files),
        files=files,
        signed=(folder / SIGNATURE_NAME).is_file(),
        scores=scores,
        scores_are_of_these_weights=_measured_these(scores, files) if scores else None,
        curve=read_evidence(folder, CURVE, CurveEvidence),
        failures=None if failures is None else len(failures),
    )


def _facts(adapter: Adapter) -> AdapterFacts:
    pairs = adapter.pairs.values()
    return AdapterFacts(
        parameters=adapter.parameters,
        modules=len(adapter.pairs),
        targets=tuple(sorted({pair.module.rpartition(".")[2] for pair in pairs})),
        ranks=tuple(sorted({pair.rank for pair in pairs})),
        scales=tuple(sorted({pair.scale for pair in pairs})),
        dtypes=tuple(sorted({entry.dtype for entry in adapter.file.entries})),
        base=adapter.config.base_model_name_or_path,
        merge_obstacles=tuple(adapter.config.obstacles()),
        vllm_rank=vllm_rank(adapter.config.r),
        vllm_obstacles=tuple(vllm_obstacles(adapter)),
    )


def _listed(folder: Path, manifest: Manifest) -> tuple[FileFacts, ...]:
    """The files of a release, and those that are there without being listed."""
    facts = []
    for name, entry in sorted(manifest.files.items()):
        path = folder / name
        state: Literal["as listed", "missing", "other size"] = "missing"
        if path.is_file():
            state = "as listed" if path.stat().st_size == entry.size else "other size"
        facts.append(FileFacts(name, entry.size, entry.sha256, state))
    others = (name for name in list_files(folder) if name not in manifest.files and not is_unlisted(name))
    return (*facts, *_sized(folder, others, "not listed"))


def _found(folder: Path) -> tuple[FileFacts, ...]:
    return tuple(_sized(folder, list_files(folder), "found"))


def _sized(folder: Path, names: Iterable[str], state: Literal["not listed", "found"]) -> list[FileFacts]:
    return [
        FileFacts(name, (folder / name).stat().st_size, None, state)
        for name in names
        if (folder / name).exists()
    ]


def _count(folder: Path, files: Iterable[FileFacts]) -> int:
    weights = [
        folder / file.path for file in files if file.path.endswith(_WEIGHT_SUFFIX) and file.state != "missing"
    ]
    return sum(_numbers(read_header(path).entries) for path in weights)


def _numbers(entries: Sequence[TensorEntry]) -> int:
    """Numbers that tensors stand for: two codes a byte of a 4-bit weight, none of what decodes them."""
    states = [entry.name for entry in entries if _STATE in entry.name]
    packed = {name.partition(_STATE)[0] for name in states}
    total = 0
    for entry in entries:
        owner, within, _part = entry.name.partition(".weight.")
        decodes = (within and f"{owner}.weight" in packed) or entry.name.endswith(".SCB")
        total += 0 if decodes else math.prod(entry.shape) * (2 if entry.name in packed else 1)
    return total


def _measured_these(scores: ScoresEvidence, files: Iterable[FileFacts]) -> bool:
    return any(file.sha256 == scores.adapter_sha256 for file in files)
