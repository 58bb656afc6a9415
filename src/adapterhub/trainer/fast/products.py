"""Products with frozen 4-bit weights and the adapters on them, forward and backward, by hand.

Without dropout the adapter is folded into the dequantized weight: ``W' = W + scale · B A`` is formed in
float32 and rounded to the compute dtype once, as W alone would be. That makes y = x W'ᵀ and dx = dy W' one
product each, so none of the thin products that LoRA adds to forward and to the input's gradient remain. The
adapter's own gradients are dB = scale · dyᵀ (x Aᵀ) and dA = scale · (dy B)ᵀ x (Hu et al. 2021, by the chain
rule), summed in float32. With dropout the adapter sees another input than the base, so its products are
formed apart; the mask is drawn again in backward from the same seed instead of being kept.
"""

from __future__ import annotations

from types import ModuleType

import torch

from adapterhub.trainer.fast.weights import Adapter, Group, Linear


class Products:
    """Forward and backward of groups, with one buffer for whatever weight is dequantized at the moment."""

    def __init__(self, operations: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
        self._operations = operations
        self._dtype = dtype
        self._device = device
        self._buffer = torch.empty(0, dtype=dtype, device=device)

    def reserve(self, group: Group) -> None:
        """Make the buffer large enough for ``group``; before training, so that a step allocates nothing."""
        if group.buffer_elements > self._buffer.numel():
            self._buffer = torch.empty(group.buffer_elements, dtype=self._dtype, device=self._device)

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
        if group.stacked:
            y = self._product(x, self._dequantize(group, group.linears, seed), group.bias, residual)
        else:
            y = torch.empty(x.shape[0], group.outputs, dtype=x.dtype, device=x.device)
            for linear, start in zip(group.linears, group.starts, strict=True):
                columns = slice(start, start + linear.weight.outputs)
                weight = self._dequantize(group, [linear], seed)
                torch.mm(x, weight.t(), out=y[:, columns])
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
        if group.stacked:
            grad_x = torch.mm(grad, self._dequantize(group, group.linears, seed))
        else:
            grad_x = torch.empty(grad.shape[0], group.inputs, dtype=grad.dtype, device=grad.device)
            for index, (linear, start) in enumerate(zip(group.linears, group.starts, strict=True)):
                columns = grad[:, start : start + linear.weight.outputs]
                weight = self._dequantize(group, [linear], seed)
                torch.addmm(grad_x, columns, weight, beta=1 if index else 0, out=grad_x)
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

    def _dequantize(self, group: Group, linears: list[Linear], seed: int | None) -> torch.Tensor:
        """The weights of ``linears``, adapters folded in when there is no dropout, in the shared buffer."""
        dropped = seed is not None and group.drops
        outputs = sum(linear.weight.outputs for linear in linears)
        stacked = self._buffer[: outputs * group.inputs].view(outputs, group.inputs)
        at = 0
        for linear in linears:
            rows = stacked[at : at + linear.weight.outputs]
            self._operations.dequantize(linear.weight, rows, None if dropped else linear.adapter)
            at += linear.weight.outputs
        return stacked

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
