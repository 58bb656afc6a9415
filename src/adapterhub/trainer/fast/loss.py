"""The loss over a frozen head without ever holding all logits: chunk by chunk, gradient at once."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from adapterhub.trainer.activations import LOSS_CHUNK

IGNORED = -100


class NormFunction(torch.autograd.Function):
    """The final RMSNorm, whose weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, operations: ModuleType
    ) -> torch.Tensor:
        """``x`` (T, h) normed."""
        y: torch.Tensor
        y, rstd = operations.norm_forward(x, weight, eps, offset)
        if any(ctx.needs_input_grad):
            ctx.kept, ctx.offset, ctx.operations = (x, weight, rstd), offset, operations
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.kept
        ctx.kept = None
        grad = torch.zeros_like(x)
        ctx.operations.norm_backward(grads[0], x, weight, rstd, ctx.offset, grad)
        return grad, None, None, None, None


class LossFunction(torch.autograd.Function):
    """Cross-entropy of a linear head, summed over tokens.

    The gradient of the hidden states is formed in forward while each chunk's logits are there, and scaled in
    backward: the head is frozen, so nothing else is needed (as Liger's fused linear cross-entropy does it,
    but without its device-to-host transfer).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        operations: ModuleType,
    ) -> torch.Tensor:
        """``hidden`` (T, h), ``head`` (V, h), ``labels`` (T) int64, ``IGNORED`` where there is no loss ->
        float32 ().
        """
        tokens = hidden.shape[0]
        losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        needed = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needed else None
        for start in range(0, tokens, LOSS_CHUNK):
            rows = slice(start, min(tokens, start + LOSS_CHUNK))
            with torch.autocast(hidden.device.type, enabled=False):
                logits = torch.mm(hidden[rows], head.t())
                squashed = None
                if softcap is not None:
                    squashed = torch.tanh(logits / softcap)
                    logits = squashed * softcap
                operations.cross_entropy(logits, labels[rows], losses[rows], IGNORED, gradient=needed)
                if grad is not None:
                    if squashed is not None:
                        logits = logits * (1 - squashed * squashed)
                    torch.mm(logits, head, out=grad[rows])
        ctx.grad = grad
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(grads[0].to(grad.dtype)), None, None, None, None
