"""Products with frozen 4-bit weights and the adapters on them, forward and backward, by hand.

Without dropout the adapter is folded into the dequantized weight: ``W' = W + scale · B A`` is formed in
float32 and rounded to the compute dtype once, as W alone would be. That makes y = x W'ᵀ and dx = dy W' one
product each, so none of the thin products that LoRA adds to forward and to the input's gradient remain. The
adapter's own gradients are dB = scale · dyᵀ (x Aᵀ) and dA = scale · (dy B)ᵀ x (Hu et al. 2021, by the chain
rule), summed in float32. With dropout the adapter sees another input than the base, so its products are
formed apart; the mask is drawn again in backward from the same seed instead of being kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from adapterhub.trainer.fast.weights import Adapter, Group, Linear


@dataclass
class _Kept:
    """A group's weights in the compute dtype, adapters folded in."""

    weights: torch.Tensor
    """(outputs, inputs)."""
    version: int | None = None
    """That of the adapters that are folded in; None before the first time."""


class Products:
    """Forward and backward of groups, with one buffer for whatever weight is dequantized at the moment.

    Each weight is written along the dimension that its product sums over, (outputs, inputs) contiguous for
    forward and its transpose for backward: that is the layout cuBLAS is fastest with.
    """

    def __init__(self, operations: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
        self._operations = operations
        self.dtype = dtype
        self._device = device
        self._buffer = torch.empty(0, dtype=dtype, device=device)
        self._kept: dict[Group, tuple[_Kept, _Kept]] = {}

    def reserve(self, group: Group) -> None:
        """Make the buffer large enough for ``group``; before training, so that a step allocates nothing."""
        if group.buffer_elements > self._buffer.numel():
            self._buffer = torch.empty(group.buffer_elements, dtype=self.dtype, device=self._device)

    def keep(self, group: Group) -> None:
        """Keep ``group``'s weights for forward and backward, 4 B each in bf16, from one micro-batch to the
        next.

        They are made anew when an optimizer step, or loading, has changed the adapters. While dropout is
        active they are not used.
        """
        size = group.outputs * group.inputs
        ahead, back = (torch.empty(size, dtype=self.dtype, device=self._device) for _ in range(2))
        self._kept[group] = (
            _Kept(ahead.view(group.outputs, group.inputs)),
            _Kept(back.view(group.inputs, group.outputs).t()),
        )

    @property
    def buffer_elements(self) -> int:
        """Elements of the buffer, all groups that were reserved for considered."""
        return self._buffer.numel()

    def forward(
        self, group: Group, x: torch.Tensor, seed: int | None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x`` (T, inputs) through all linears: (T, outputs), plus ``residual`` (T, outputs) if given.

        ``seed`` draws the dropout masks; None: nothing is dropped.
        """
        weight = self._whole_weight(group, seed, backward=False)
        if weight is not None:
            y = self._product(x, weight, group.bias, residual)
        else:
            y = torch.empty(x.shape[0], group.outputs, dtype=x.dtype, device=x.device)
            for linear, start in zip(group.linears, group.starts, strict=True):
                columns = slice(start, start + linear.weight.outputs)
                one = self._place(linear.weight.outputs, group.inputs, backward=False)
                self._dequantize([linear], one, folded=not group.dropped(seed))
                torch.mm(x, one.t(), out=y[:, columns])
            if group.bias is not None:
                y += group.bias
            if residual is not None:
                y += residual
        if seed is not None and group.drops:
            for index, (adapter, _, columns) in enumerate(group.placed):
                seen = x * _mask(adapter, x, seed + index)
                y[:, columns].addmm_(seen @ adapter.a.t(), adapter.b.t(), alpha=adapter.scale)
        return y

    def inner_gradient(self, group: Group, grad: torch.Tensor) -> torch.Tensor | None:
        """``scale · grad B`` of all adapters side by side (T, sum of ranks), given the output's gradient (T,
        outputs).
        """
        if not group.adapters:
            return None
        ranks = sum(adapter.a.shape[0] for adapter in group.adapters)
        inner = torch.empty(grad.shape[0], ranks, dtype=grad.dtype, device=grad.device)
        for adapter, rows, columns in group.placed:
            torch.addmm(
                inner[:, rows], grad[:, columns], adapter.b, beta=0, alpha=adapter.scale, out=inner[:, rows]
            )
        return inner

    def input_gradient(
        self, group: Group, grad: torch.Tensor, inner: torch.Tensor | None, seed: int | None
    ) -> torch.Tensor:
        """The gradient of the input (T, inputs), given the output's (T, outputs) and ``inner_gradient`` of
        it.
        """
        weight = self._whole_weight(group, seed, backward=True)
        if weight is not None:
            grad_x = torch.mm(grad, weight)
        else:
            grad_x = torch.empty(grad.shape[0], group.inputs, dtype=grad.dtype, device=grad.device)
            for index, (linear, start) in enumerate(zip(group.linears, group.starts, strict=True)):
                columns = grad[:, start : start + linear.weight.outputs]
                one = self._place(linear.weight.outputs, group.inputs, backward=True)
                self._dequantize([linear], one, folded=not group.dropped(seed))
                torch.addmm(grad_x, columns, one, beta=1 if index else 0, out=grad_x)
        if seed is not None and group.drops and inner is not None:
            for index, (adapter, rows, _) in enumerate(group.placed):
                grad_x.add_((inner[:, rows] @ adapter.a) * _mask(adapter, grad_x, seed + index))
        return grad_x

    def adapter_gradients(
        self, group: Group, x: torch.Tensor, grad: torch.Tensor, inner: torch.Tensor | None, seed: int | None
    ) -> None:
        """Add dA and dB, given the input (T, inputs), the output's gradient and ``inner_gradient`` of it."""
        if inner is None or group.a is None or group.grad_a is None:
            return
        if seed is None or not group.drops:
            outer = torch.mm(x, group.a.t())
            for adapter, rows, columns in group.placed:
                _accumulate(adapter.grad_b, grad[:, columns].t(), outer[:, rows], adapter.scale)
            _accumulate(group.grad_a, inner.t(), x, 1.0)
            return
        for index, (adapter, rows, columns) in enumerate(group.placed):
            seen = x * _mask(adapter, x, seed + index)
            _accumulate(adapter.grad_b, grad[:, columns].t(), seen @ adapter.a.t(), adapter.scale)
            _accumulate(adapter.grad_a, inner[:, rows].t(), seen, 1.0)

    def _whole_weight(self, group: Group, seed: int | None, *, backward: bool) -> torch.Tensor | None:
        """The weights of all linears (outputs, inputs) for one product, or None where each has its own."""
        kept = self._kept.get(group)
        if kept is not None and not group.dropped(seed):
            found = kept[1 if backward else 0]
            if found.version != group.version:
                self._dequantize(group.linears, found.weights, folded=True)
                found.version = group.version
            return found.weights
        if not group.stacked:
            return None
        stacked = self._place(group.outputs, group.inputs, backward=backward)
        self._dequantize(group.linears, stacked, folded=not group.dropped(seed))
        return stacked

    def _place(self, outputs: int, inputs: int, *, backward: bool) -> torch.Tensor:
        """A weight (outputs, inputs) in the buffer, with the layout that the direction wants."""
        flat = self._buffer[: outputs * inputs]
        return flat.view(inputs, outputs).t() if backward else flat.view(outputs, inputs)

    def _dequantize(self, linears: list[Linear], stacked: torch.Tensor, *, folded: bool) -> None:
        """Write the weights of ``linears`` to ``stacked``, one below the other, with their adapters if
        ``folded``.
        """
        at = 0
        for linear in linears:
            rows = stacked[at : at + linear.weight.outputs]
            self._operations.dequantize(linear.weight, rows, linear.adapter if folded else None)
            at += linear.weight.outputs

    @staticmethod
    def _product(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        if residual is not None:
            y = torch.addmm(residual, x, weight.t())
            return y if bias is None else y.add_(bias)
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _mask(adapter: Adapter, like: torch.Tensor, seed: int) -> torch.Tensor:
    """The dropout mask (T, inputs) that ``seed`` draws, scaled to keep the mean."""
    generator = torch.Generator(like.device).manual_seed(seed)
    kept = torch.rand(like.shape, generator=generator, device=like.device) >= adapter.dropout
    return kept.to(like.dtype) / (1 - adapter.dropout)


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """``total += scale · left @ right`` with a float32 total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, beta=1, alpha=scale, out=total)
    else:
        total.addmm_(left.float(), right.float(), alpha=scale)
