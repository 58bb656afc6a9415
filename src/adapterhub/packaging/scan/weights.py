"""The tensors: a container without tricks, factors that belong together, and values that stand out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, Adapter, read_adapter
from adapterhub.packaging.scan.findings import Finding, quote
from adapterhub.packaging.scan.settings import read_json
from adapterhub.packaging.tensors import FLOATS, read_header, read_tensor
from adapterhub.packaging.updates import is_transposed

if TYPE_CHECKING:
    from adapterhub.packaging.checkpoint import Checkpoint

_MIN_PEERS = 4
_OUTLIER = 10.0
"""A layer whose weight change is this many times its peers' median stands out."""
_DAMAGED = "take the adapter from its source again"


@dataclass(frozen=True)
class LayerNorm:
    """How much an adapter changes one layer."""

    module: str
    norm: float
    """Frobenius norm of s·B·A; NaN when a factor holds NaN or infinite values."""


def scan_weights(folder: Path, names: list[str], base: Checkpoint | None) -> Iterator[Finding]:
    """What the safetensors files among ``names`` are, by header and, for the adapter's factors, by value.

    Given the base, each factor pair must fit a weight of it.
    """
    sound = True
    for name in names:
        if name.endswith(".safetensors"):
            try:
                read_header(folder / name)
            except ReleaseError as err:
                sound = False
                yield Finding("high", "safetensors", quote(err.what), name, err.fix)
    if CONFIG_NAME not in names:
        yield _no_adapter(any(name.endswith(".safetensors") for name in names))
        return
    if not sound or (WEIGHTS_NAME not in names and PICKLE_NAME in names):
        return
    settings, _problem = read_json(folder / CONFIG_NAME)
    if isinstance(settings, dict) and settings.get("peft_type", "LORA") != "LORA":
        what = f"a {quote(settings['peft_type'], 40)} adapter, not a LoRA: its values were not looked at"
        yield Finding(
            "info", "not-lora", what, f"{CONFIG_NAME}: peft_type", "load it with peft, if you trust it"
        )
        return
    try:
        adapter = read_adapter(folder)
    except ReleaseError as err:
        yield Finding("high", "adapter", quote(err.what), _place(err.what), err.fix)
        return
    yield from _others(adapter)
    if base is not None:
        yield from _misfits(adapter, base)
    yield from _values(adapter)


def layer_norms(adapter: Adapter) -> Iterator[LayerNorm]:
    """The Frobenius norm of each module's s·B·A, one layer in memory at a time.

    By ‖BA‖² = ⟨BᵀB, AAᵀ⟩, so nothing of the weight's own size is made.
    """
    import torch

    for module, pair in adapter.pairs.items():
        a, b = (read_tensor(adapter.file, entry).to(torch.float64) for entry in (pair.a, pair.b))
        squared = float(((b.T @ b) * (a @ a.T)).sum())
        norm = abs(pair.scale) * math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else math.nan
        yield LayerNorm(module, norm)


def _no_adapter(has_tensors: bool) -> Finding:
    """That a scan without findings says little of a folder which is no adapter."""
    if has_tensors:
        what = f"there is no {CONFIG_NAME}: the tensors' values were not looked at, their headers were"
        return Finding("info", "no-adapter", what, ".", "for an adapter, take what belongs to it too")
    what = f"there is neither an {CONFIG_NAME} nor a .safetensors file: nothing of a model was looked at"
    return Finding("info", "no-adapter", what, ".", "check that it is the folder that you mean")


def _place(what: str) -> str:
    return WEIGHTS_NAME if WEIGHTS_NAME in what and CONFIG_NAME not in what else CONFIG_NAME


def _others(adapter: Adapter) -> Iterator[Finding]:
    if not adapter.pairs:
        what = "no LoRA factor of a linear layer is in it"
        yield Finding("medium", "no-factors", what, WEIGHTS_NAME, "ask its maker what it should do")
    if adapter.others:
        shown = quote(", ".join(adapter.others[:3]), 160)
        what = f"{len(adapter.others)} tensors that are no LoRA factor, like {shown}"
        yield Finding("low", "other-tensors", what, WEIGHTS_NAME, "know that it is more than a LoRA")


def _misfits(adapter: Adapter, base: Checkpoint) -> Iterator[Finding]:
    for pair in adapter.pairs.values():
        name = f"{pair.module}.weight"
        weight = base.tensors.get(name)
        shape = (pair.out_features, pair.in_features)
        if weight is not None and is_transposed(base, name, pair, weight.shape):
            shape = shape[::-1]
        if weight is None:
            what = "the base has no such layer"
        elif weight.shape != shape:
            what = f"changes a weight of {list(shape)}, the base's is {list(weight.shape)}"
        else:
            continue
        where = f"{WEIGHTS_NAME}: {quote(pair.module)}"
        yield Finding("high", "base-shape", what, where, "load it on the base it was trained on")


def _values(adapter: Adapter) -> Iterator[Finding]:
    for entry in adapter.file.entries:
        if entry.name in adapter.others and entry.dtype in FLOATS:
            import torch

            if not torch.isfinite(read_tensor(adapter.file, entry)).all():
                yield _not_finite(entry.name)
    peers: dict[str, list[LayerNorm]] = defaultdict(list)
    silent = 0
    for layer in layer_norms(adapter):
        if math.isnan(layer.norm):
            yield _not_finite(layer.module)
        elif layer.norm == 0:
            silent += 1
        else:
            peers[layer.module.rpartition(".")[2]].append(layer)
    if silent:
        what = f"{silent} of {len(adapter.pairs)} layers change nothing: a factor is all zeros"
        yield Finding("info", "zeros", what, WEIGHTS_NAME, "know that it was not trained there")
    for target, layers in peers.items():
        middle = median(layer.norm for layer in layers)
        for layer in layers if len(layers) >= _MIN_PEERS else ():
            if layer.norm > _OUTLIER * middle:
                times = f"{layer.norm / middle:.0f} times the median of this adapter's {target} layers"
                what = f"changes its weight by a norm of {layer.norm:.4g}, {times}"
                fix = "compare its answers with the base's: a layer like this can carry a planted behaviour"
                yield Finding("medium", "outlier", what, f"{WEIGHTS_NAME}: {quote(layer.module)}", fix)


def _not_finite(name: str) -> Finding:
    what = "holds NaN or infinite values: every answer would be broken"
    return Finding("high", "not-finite", what, f"{WEIGHTS_NAME}: {quote(name)}", _DAMAGED)
