"""An adapter re-fitted for another version of its base: what the versions differ in goes into its factors.

Trained on weights W₁ (4-bit ones, say), an adapter adds s·B·A to them. On another version W₂ of the base the
same sum needs s·B′·A′ = (W₁ + s·B·A) − W₂, of which the nearest of the adapter's rank is taken: LoftQ's step
(https://arxiv.org/abs/2310.08659, equation 6) with both sides quantized, and as the layer's own inputs see it
where there is text to gather them from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from adapterhub.packaging.evidence import FidelityFigures, read_evidence
from adapterhub.packaging.lowrank import nearest_for_inputs, nearest_of_rank, root_of_moment
from adapterhub.packaging.manifest import BaseLock, Frozen, Hardware, Sha256
from adapterhub.packaging.updates import some
from adapterhub.packaging.variants import Variant

if TYPE_CHECKING:
    import torch

RETARGET = "evidence/retarget.json"


class LayerFit(Frozen):
    """How far one layer on the new base is from the same layer on the old one."""

    name: str
    """In the base."""
    rank: Annotated[int, Field(ge=1)]
    error_before: Annotated[float, Field(ge=0)]
    """‖(W₁ + s·B·A) − (W₂ + s·B·A)‖ / ‖W₁ + s·B·A‖ as the layer's inputs see it: the adapter as it was."""
    error_after: Annotated[float, Field(ge=0)]
    """The same with the re-fitted factors."""


class RetargetEvidence(Frozen):
    """What re-fitting an adapter for another version of its base did."""

    schema_version: Literal[1] = 1
    parent: str
    """``name@version`` of the release it was made from."""
    parent_sha256: Sha256
    """Its manifest's."""
    adapter_sha256: Sha256
    """Of the adapter_model.safetensors in this release."""
    old_base: BaseLock
    new_base: BaseLock
    weighting: Literal["inputs", "none"]
    """Whether errors count as the layers' inputs see them, or every weight alike."""
    kept: Literal["refitted", "as it was"]
    """Which factors this release holds: with text, those whose KL is lower."""
    layers: tuple[LayerFit, ...]
    text: str | None = None
    """The file's name; None: nothing was calibrated or measured."""
    text_sha256: Sha256 | None = None
    calibrated: Annotated[int, Field(ge=0)] = 0
    """Texts that inputs were gathered on."""
    measured: Annotated[int, Field(ge=0)] = 0
    """Texts that the figures are of: others than those, unless there were fewer than four."""
    as_it_was: FidelityFigures | None = None
    """The adapter unchanged on the new base, against it on the old one."""
    refitted: FidelityFigures | None = None
    tools: dict[str, str] = Field(default_factory=dict)
    hardware: Hardware
    seconds: float


@dataclass(frozen=True)
class Fit:
    """One layer's new factors."""

    a: torch.Tensor
    """(rank, in) float32."""
    b: torch.Tensor
    """(out, rank) float32."""
    report: LayerFit


def read_retarget(folder: Path) -> RetargetEvidence | None:
    """The evidence of a release folder, or None when it was not retargeted; ManifestError when malformed."""
    return read_evidence(folder, RETARGET, RetargetEvidence)


def check_refittable(adapter: Adapter) -> None:
    """Raise ReleaseError for an adapter that is more than factors on linear layers."""
    obstacles = adapter.config.obstacles()
    if adapter.config.fan_in_fan_out:
        obstacles.append("fan_in_fan_out")
    if obstacles or adapter.others or not adapter.pairs:
        what = "; ".join(obstacles) or some(adapter.others) or "no factors of linear layers"
        raise ReleaseError(
            f"{adapter.folder} cannot be re-fitted: it has {what}", "train it on the other base"
        )


def refit_layers(
    adapter: Adapter, old: Variant, new: Variant, moments: Mapping[str, torch.Tensor], layers: list[str]
) -> Iterator[Fit]:
    """New factors for each of ``layers``, on the CPU; one layer in memory at a time.

    ``moments`` are E[x·xᵀ] of a layer's inputs (in, in) by name, and a layer is fitted on the device of its
    own; a layer without one counts every weight alike. Raises ReleaseError when a weight is not a finite
    number.
    """
    import torch

    for layer in layers:
        pair = adapter.pairs[layer]
        moment = moments.get(layer)
        device = "cpu" if moment is None else moment.device
        a, b = (factor.to(device) for factor in adapter.load_pair(layer))
        before, after = (variant.weight(layer).to(device) for variant in (old, new))
        wanted = torch.addmm(before, b, a, alpha=pair.scale)
        missing = wanted - after
        if not torch.isfinite(missing).all():
            raise ReleaseError(f"{layer!r} holds NaN or infinite values", "verify both bases")
        root = None if moment is None else root_of_moment(moment)
        if root is None:
            new_b, new_a = nearest_of_rank(missing, pair.rank)
        else:
            new_b, new_a = nearest_for_inputs(missing, pair.rank, root)
        whole = _norm(wanted, root)
        report = LayerFit(
            name=layer,
            rank=pair.rank,
            error_before=_norm(before - after, root) / whole if whole else 0.0,
            error_after=_norm(missing - new_b @ new_a, root) / whole if whole else 0.0,
        )
        share = math.sqrt(abs(pair.scale))
        if share == 0:
            raise ReleaseError(f"{adapter.folder}: the scale of {layer!r} is 0", "train it with an alpha")
        new_a, new_b = new_a / share, new_b * (math.copysign(1, pair.scale) / share)
        yield Fit(new_a.cpu(), new_b.cpu(), report)


def _norm(matrix: torch.Tensor, root: torch.Tensor | None) -> float:
    return float((matrix if root is None else matrix @ root).norm())


def write_factors(
    folder: Path, adapter: Adapter, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], base: str
) -> None:
    """Write a PEFT adapter to ``folder``: the settings of ``adapter``, but ``factors`` (A, B) by layer.

    ``base`` is what adapter_config.json names as its base. Numbers keep the dtype that they had.
    """
    import torch
    from safetensors.torch import save

    from adapterhub.packaging.tensors import FLOATS

    tensors = {}
    for layer, (a, b) in factors.items():
        pair = adapter.pairs[layer]
        for entry, factor in ((pair.a, a), (pair.b, b)):
            tensors[entry.name] = factor.to(getattr(torch, FLOATS[entry.dtype])).contiguous()
    (folder / WEIGHTS_NAME).write_bytes(save(tensors, {"format": "pt"}))
    settings = json.loads((adapter.folder / CONFIG_NAME).read_bytes())
    settings["base_model_name_or_path"] = base
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
