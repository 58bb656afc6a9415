"""Calibrated rounding: a checkpoint's 4-bit codes chosen on text, decoder layer by decoder layer.

Each linear layer sees what the layers below it, as they are rounded already, give to it, and is to put out
what it puts out in the wanted model: with inputs x there and x̃ here its codes approach
T = W·(Σ x·x̃ᵀ)·(Σ x̃·x̃ᵀ)⁻¹ and so make up for errors from below (as in GPTAQ,
https://arxiv.org/abs/2504.02692). Scales are fixed before codes are chosen: where the wanted weights are what
training saw plus an update, they are training's own, so that what training saw is on the grid already and
the update alone has to be expressed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import ReleaseError
from adapterhub.packaging.calibration.decoder import Decoder, Row, Weights, inputs_of, run_layer, watched
from adapterhub.packaging.calibration.rounding import (
    Grid,
    aim,
    block_scales,
    choose_codes,
    output_error,
    pack,
    read_grid,
    spread,
    stored_scales,
    unpack,
)
from adapterhub.packaging.calibration.store import CodeStore
from adapterhub.packaging.checkpoint import Checkpoint
from adapterhub.packaging.evidence import ROUNDING, RoundingError, RoundingEvidence, to_json
from adapterhub.packaging.layout import BLOCK, Quantized4bit
from adapterhub.packaging.sums import SumPlan
from adapterhub.packaging.tensors import TensorEntry, TensorFile, read_tensor
from adapterhub.packaging.writing import Examine

if TYPE_CHECKING:
    import torch

_TINY = 1e-30
# Blocks of zeros have a scale of zero, which nothing can be divided by.

Report = Callable[[int, int], None]
"""Told the decoder layers that are done, and all of them."""


@dataclass(frozen=True)
class CalibrationText:
    """What codes are chosen on."""

    name: str
    """The file's name."""
    sha256: str
    """Of the file's bytes."""
    texts: Sequence[Sequence[int]]
    """Token ids."""
    report: Report = lambda _done, _all: None


class Rounding:
    """The codes of a plan's 4-bit weights, once they are chosen."""

    def __init__(self, checkpoint: Checkpoint, plan: SumPlan, text: CalibrationText) -> None:
        """Raises ReleaseError when the plan stores nothing in 4 bits."""
        if plan.layout.storage not in ("nf4", "fp4"):
            raise ReleaseError(
                f"there are no codes to choose in {plan.layout.storage}", "leave --rounding calibrated out"
            )
        self._checkpoint, self._plan, self._text = checkpoint, plan, text
        self._store: CodeStore | None = None

    def choose(self, folder: Path, key: str) -> None:
        """Choose all codes, with ``folder`` for those of finished layers; ``key`` says of what they are.

        Computed on the plan's device. Memory holds two copies of one decoder layer, and for the texts' tokens
        what lies before it and what its linear layers get, in the wanted and in the rounded model. Layers
        that ``folder`` holds for the same key are not computed again. Raises ReleaseError when a weight lies
        outside the decoder's layers, or when transformers cannot build the model.
        """
        import torch

        store = CodeStore(folder, key, read_grid(self._plan.layout.storage).by_code)
        work = _Work(self._checkpoint, self._plan, store)
        if self._plan.layout.quantized - store.names:
            with torch.inference_mode():
                rows = work.decoder.enter(self._text.texts)
                count = len(work.decoder.layers)
                for number in range(count):
                    work.do_layer(number, rows)
                    self._text.report(number + 1, count)
        outside = sorted(self._plan.layout.quantized - store.names)
        if outside:
            raise ReleaseError(
                f"{self._checkpoint.folder}: {outside[0]!r} does nothing in a decoder layer",
                "merge with --rounding nearest",
            )
        self._store = store

    def load(self, name: str) -> Quantized4bit:
        """The codes and scales of the weight ``name``, on the CPU, after ``choose``."""
        assert self._store is not None
        return self._store.load(name)

    def evidence(self) -> RoundingEvidence:
        """What choosing gained, after ``choose``."""
        assert self._store is not None
        errors = self._store.errors
        return RoundingEvidence(
            text=self._text.name,
            text_sha256=self._text.sha256,
            texts=len(self._text.texts),
            tokens=sum(len(ids) for ids in self._text.texts),
            weights=tuple(error for number in sorted(errors) for error in errors[number]),
        )


def note_text(text: CalibrationText | None) -> dict[str, object]:
    """What decides the bytes of the result, for the journal of a merge."""
    if text is None:
        return {}
    return {"calibration": sha256(json.dumps([list(ids) for ids in text.texts]).encode()).hexdigest()}


def add_rounding(rounding: Rounding | None, examine: Examine | None) -> Examine | None:
    """``examine`` that also puts evidence/rounding.json beside the checkpoint."""
    if rounding is None:
        return examine
    return lambda folder: {
        ROUNDING: to_json(rounding.evidence()),
        **(examine(folder) if examine is not None else {}),
    }


@dataclass(frozen=True)
class _Work:
    checkpoint: Checkpoint
    plan: SumPlan
    store: CodeStore

    @cached_property
    def sums(self) -> Weights:
        """Every tensor of the wanted model."""
        shards = self.checkpoint.shards
        return {name: compute for shard in shards for name, compute in self.plan.sums_of(shard)}

    @cached_property
    def decoder(self) -> Decoder:
        vocabulary = self.plan.updates.vocabulary
        changed = {} if vocabulary is None else {"vocab_size": vocabulary}
        return Decoder(self.checkpoint.folder, changed, self.sums, self.plan.device)

    @cached_property
    def grid(self) -> Grid:
        return read_grid(self.plan.layout.storage, self.plan.device)

    @cached_property
    def base(self) -> Mapping[str, tuple[TensorFile, TensorEntry]]:
        """The base's own tensors."""
        return {entry.name: (shard, entry) for shard in self.checkpoint.shards for entry in shard.entries}

    def do_layer(self, number: int, rows: list[Row]) -> None:
        """Choose one layer's codes, if the store has none, and take the rows through it."""
        prefix = self.decoder.layers[number][0] + "."
        names = sorted(name for name in self.plan.layout.quantized if name.startswith(prefix))
        exact = {name: self.sums[name]() for name in names}
        wanted = self.decoder.fill(number, exact)
        rounded = self.decoder.fill(number, exact)
        modules = [name.removeprefix(prefix).removesuffix(".weight") for name in names]
        outputs, seen = _run_wanted(wanted, number, rows, modules)
        if number not in self.store.errors:
            self._choose_layer(number, rows, rounded, exact, seen, outputs)
        for name, module in zip(names, modules, strict=True):
            _set(rounded.get_submodule(module), self._dense(self.store.load(name), exact[name].shape))
        for row, output in zip(rows, outputs, strict=True):
            row.rounded = run_layer(rounded, number, row.rounded, row)
            row.wanted = output

    def _choose_layer(
        self,
        number: int,
        rows: list[Row],
        rounded: torch.nn.Module,
        exact: Mapping[str, torch.Tensor],
        seen: list[dict[str, torch.Tensor]],
        outputs: list[torch.Tensor],
    ) -> None:
        """Choose codes module after module, each put into ``rounded`` before the next sees its inputs.

        The last, where its output is added to what the layer puts out, makes up for everything before it.
        """
        import torch

        prefix = self.decoder.layers[number][0] + "."
        weights: dict[str, Quantized4bit] = {}
        errors = []
        groups = _groups(seen[0])
        for group in groups:
            names = [f"{prefix}{module}.weight" for module in group]
            weight = torch.cat([exact[name] for name in names])
            if group == groups[-1] and _is_added(rounded, number, rows[0], group):
                hessian, missing = _whole_moments(rounded, number, rows, group[0], outputs)
            else:
                hessian, drift = _moments(rounded, number, rows, group[0], seen)
                missing = weight @ drift
            for name, kept, error in self._choose(names, exact, aim(weight, hessian, missing), hessian):
                weights[name] = kept
                errors.append(error)
            for name, module in zip(names, group, strict=True):
                _set(rounded.get_submodule(module), self._dense(weights[name], exact[name].shape))
        self.store.save(number, weights, errors)

    def _choose(
        self,
        names: Sequence[str],
        exact: Mapping[str, torch.Tensor],
        aimed: torch.Tensor,
        hessian: torch.Tensor,
    ) -> Iterator[tuple[str, Quantized4bit, RoundingError]]:
        """The codes of weights with the same inputs: chosen together, compared with rounding one by one."""
        import torch

        sizes = [exact[name].shape[0] for name in names]
        fixed = [
            self._fixed_scales(name, exact[name], goal, hessian)
            for name, goal in zip(names, aimed.split(sizes), strict=True)
        ]
        steps = torch.cat([_steps(scales, exact[name]) for name, scales in zip(names, fixed, strict=True)])
        places = choose_codes(aimed, hessian, steps, self.grid)
        found = self.grid.values[places] * steps
        parts = zip(*(whole.split(sizes) for whole in (aimed, places, found)), strict=True)
        for name, scales, (target, own_places, own) in zip(names, fixed, parts, strict=True):
            whole = output_error(torch.zeros_like(target), target, hessian) or 1.0
            error = output_error(own, target, hessian) / whole
            near_places, near_scales, near = self._nearest(exact[name])
            nearest = output_error(near, target, hessian) / whole
            if error < nearest:
                kept = Quantized4bit(pack(own_places, self.grid), scales, self.grid.by_code)
            else:
                kept = Quantized4bit(pack(near_places, self.grid), near_scales, self.grid.by_code)
            yield name, kept, RoundingError(name=name, nearest=nearest, chosen=min(error, nearest))

    def _fixed_scales(
        self, name: str, weight: torch.Tensor, aimed: torch.Tensor, hessian: torch.Tensor
    ) -> torch.Tensor:
        """The scales to choose codes for, as they are before double quantization.

        The weight's own, or training's where they serve better: while the update is small beside the steps.
        """
        import torch

        quantization, storage = self.plan.quantization, self.plan.layout.storage
        own = block_scales(weight, storage)
        if (
            name not in self.plan.quantized
            or quantization is None
            or (quantization.type, quantization.block_size) != (storage, BLOCK)
        ):
            return own
        base = read_tensor(*self.base[name]).to(self.plan.device, torch.bfloat16)
        training = block_scales(base, storage)

        def error(scales: torch.Tensor) -> float:
            steps = _steps(scales, weight)
            return output_error(self.grid.values[self.grid.nearest(weight / steps)] * steps, aimed, hessian)

        return min((training, own), key=error)

    def _nearest(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Places, scales and values of a weight that is rounded to nearest."""
        scales = block_scales(weight, self.plan.layout.storage)
        exact = spread(scales.to(weight.device), weight.shape).clamp_min(_TINY)
        places = self.grid.nearest(weight / exact)
        return places, scales, self.grid.values[places] * _steps(scales, weight)

    def _dense(self, weight: Quantized4bit, shape: torch.Size) -> torch.Tensor:
        """What a loaded model computes with, float32."""
        device = self.plan.device
        values = self.grid.by_code[unpack(weight.codes.to(device))][: shape.numel()].view(shape)
        return values * spread(stored_scales(weight.scales).to(device), tuple(shape))


def _steps(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The scale of each number of ``weight`` as a loaded model has it, where the weight is."""
    return spread(stored_scales(scales).to(weight.device), weight.shape).clamp_min(_TINY)


def _run_wanted(
    layer: torch.nn.Module, number: int, rows: Sequence[Row], modules: Sequence[str]
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """What the wanted layer puts out for each row, and what its linear layers get."""
    outputs, inputs = [], []
    for row in rows:
        with watched(layer, modules) as seen:
            outputs.append(run_layer(layer, number, row.wanted, row))
        inputs.append(seen)
    return outputs, inputs


def _groups(seen: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Linear layers in the order in which they run, those with the same input together."""
    groups: dict[int, list[str]] = {}
    for module, given in seen.items():
        groups.setdefault(given.data_ptr(), []).append(module)
    return list(groups.values())


def _moments(
    rounded: torch.nn.Module,
    number: int,
    rows: Sequence[Row],
    module: str,
    seen: Sequence[Mapping[str, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ x̃·x̃ᵀ and Σ (x − x̃)·x̃ᵀ over all tokens, float32 (in, in); x̃ is what ``module`` gets here."""
    hessian = drift = None
    for row, expected in zip(rows, seen, strict=True):
        here = inputs_of(rounded, number, row.rounded, row, module).float()
        squares = here.T @ here
        apart = (expected[module].float() - here).T @ here
        hessian = squares if hessian is None else hessian.add_(squares)
        drift = apart if drift is None else drift.add_(apart)
    assert hessian is not None
    assert drift is not None
    return hessian, drift


def _whole_moments(
    rounded: torch.nn.Module,
    number: int,
    rows: Sequence[Row],
    module: str,
    outputs: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ x̃·x̃ᵀ (in, in), and Σ (o − õ)·x̃ᵀ (out, in) with o what the wanted layer puts out and õ this one."""
    hessian = missing = None
    for row, expected in zip(rows, outputs, strict=True):
        with watched(rounded, [module]) as seen:
            found = run_layer(rounded, number, row.rounded, row)
        here = seen[module].float()
        squares = here.T @ here
        lacks = (expected - found).float().reshape(-1, found.shape[-1]).T @ here
        hessian = squares if hessian is None else hessian.add_(squares)
        missing = lacks if missing is None else missing.add_(lacks)
    assert hessian is not None
    assert missing is not None
    return hessian, missing


def _is_added(layer: torch.nn.Module, number: int, row: Row, group: Sequence[str]) -> bool:
    """Whether one module's output is added, as it is, to what the layer puts out; found by trying."""
    import torch

    if len(group) != 1:
        return False
    plain = run_layer(layer, number, row.rounded, row)
    module = layer.get_submodule(group[0])
    handle = module.register_forward_hook(lambda _module, _given, output: output + 1)
    try:
        moved = run_layer(layer, number, row.rounded, row)
    finally:
        handle.remove()
    if moved.shape != plain.shape:
        return False
    return torch.allclose(moved - plain, torch.ones_like(plain), atol=1e-2)


def _set(module: torch.nn.Module, weight: torch.Tensor) -> None:
    module.weight.copy_(weight)  # type: ignore[operator]
