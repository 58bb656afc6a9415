"""Frozen 4-bit weights, the adapters on them, and groups of both that share an input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub.trainer.activations import STACKED_BYTES


@dataclass(frozen=True)
class FrozenWeight:
    """A linear weight of shape (outputs, inputs) in bitsandbytes' 4-bit blocks.

    Element e of the flattened weight is the high nibble of byte e/2 for even e, the low one for odd; it
    stands for ``table[nibble] · scale[e / block_size]`` (QLoRA section 3). Doubly quantized scales are
    ``scale_table[scales[b]] · scale_scales[b / 256] + scale_offset``.
    """

    codes: torch.Tensor
    """uint8, (outputs · inputs / 2), contiguous."""
    table: torch.Tensor
    """float32, (16): the values of NF4 or FP4."""
    scales: torch.Tensor
    """float32, or uint8 when doubly quantized; one a block."""
    scale_table: torch.Tensor | None
    """float32, (256)."""
    scale_scales: torch.Tensor | None
    """float32, one for 256 scales."""
    scale_offset: torch.Tensor | None
    """float32, ()."""
    block_size: int
    outputs: int
    inputs: int
    state: Any
    """bitsandbytes' own QuantState of the same tensors."""


@dataclass(frozen=True)
class Adapter:
    """LoRA on one linear: the update is ``scale · b @ a``."""

    a: torch.Tensor
    """(rank, inputs) in the compute dtype."""
    b: torch.Tensor
    """(outputs, rank) in the compute dtype."""
    grad_a: torch.Tensor
    """float32, shape of ``a``: gradients are added here."""
    grad_b: torch.Tensor
    """float32, shape of ``b``."""
    scale: float
    """alpha / rank."""
    dropout: float
    """Probability of dropping an input feature before ``a``."""


@dataclass(frozen=True)
class Linear:
    """A frozen linear module and its adapter, if it has one."""

    weight: FrozenWeight
    bias: torch.Tensor | None
    """(outputs) in the compute dtype."""
    adapter: Adapter | None


class Group:
    """Linears that share an input: their outputs stand side by side, in order.

    Their adapters' A lie one after the other in memory, so that the thin products of all of them are one.
    """

    def __init__(self, linears: list[Linear]) -> None:
        self.linears = linears
        self.inputs = linears[0].weight.inputs
        self.widths = [linear.weight.outputs for linear in linears]
        self.outputs = sum(self.widths)
        self.starts = [sum(self.widths[:index]) for index in range(len(linears))]
        adapters = [linear.adapter for linear in linears]
        self.adapters = [adapter for adapter in adapters if adapter is not None]
        self.placed = list(self._places())
        self.drops = any(adapter.dropout > 0 for adapter in self.adapters)
        self.a = _side_by_side([adapter.a for adapter in self.adapters])
        self.grad_a = _side_by_side([adapter.grad_a for adapter in self.adapters])
        biases = [linear.bias for linear in linears]
        self.bias = (
            torch.cat([b for b in biases if b is not None]) if all(b is not None for b in biases) else None
        )
        if self.bias is None and any(b is not None for b in biases):
            raise ValueError("some linears of a group have a bias and some have none")

    def _places(self) -> Iterator[tuple[Adapter, slice, slice]]:
        """Each adapter, its place among the ranks, and its linear's place among the outputs."""
        at = 0
        for linear, start in zip(self.linears, self.starts, strict=True):
            if linear.adapter is not None:
                rank = linear.adapter.a.shape[0]
                yield linear.adapter, slice(at, at + rank), slice(start, start + linear.weight.outputs)
                at += rank

    @property
    def version(self) -> int:
        """Grows whenever the adapters' compute copies are written to (torch counts that itself)."""
        return 0 if self.a is None else self.a._version

    def dropped(self, seed: int | None) -> bool:
        """Whether the adapters see dropped inputs, so that they cannot be folded into the weights."""
        return seed is not None and self.drops

    @property
    def stacked(self) -> bool:
        """Whether all weights are dequantized into one buffer for one product."""
        return len(self.linears) == 1 or 2 * self.outputs * self.inputs <= STACKED_BYTES

    @property
    def buffer_elements(self) -> int:
        """Elements of the buffer that the group's dequantized weights need."""
        outputs = self.outputs if self.stacked else max(self.widths)
        return outputs * self.inputs


def frozen_weight(module: Any) -> FrozenWeight:
    """The weight of a bitsandbytes ``Linear4bit``, sharing its memory."""
    parameter = module.weight
    state = parameter.quant_state
    outputs, inputs = state.shape
    nested = state.state2
    return FrozenWeight(
        codes=parameter.data.view(-1),
        table=state.code.float(),
        scales=state.absmax,
        scale_table=nested.code if nested else None,
        scale_scales=nested.absmax if nested else None,
        scale_offset=state.offset if nested else None,
        block_size=state.blocksize,
        outputs=outputs,
        inputs=inputs,
        state=state,
    )


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Tensors (rank_i, inputs) that follow each other in one storage, as one (sum of ranks, inputs) view."""
    if not parts:
        return None
    first, inputs = parts[0], parts[0].shape[1]
    at = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != at or not part.is_contiguous():
            raise ValueError("the adapters of a group must lie one after the other in one buffer")
        at += part.numel()
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, inputs), (inputs, 1), first.storage_offset())
