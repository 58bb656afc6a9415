"""The fast path's elementwise operations in plain torch: what runs on the CPU, and what the kernels are held
to.

``kernels`` has the same functions in Triton. Shapes: T tokens, h features; all tensors are contiguous but
where a stride is spoken of. Arithmetic inside is float32, results have the input's dtype.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from adapterhub.trainer.fast.weights import Adapter, FrozenWeight

Activation = Literal["silu", "gelu_tanh"]


def dequantize(weight: FrozenWeight, out: torch.Tensor, adapter: Adapter | None) -> None:
    """Write the weight, plus ``scale · b @ a`` of ``adapter`` if given, to ``out`` (outputs, inputs), rounded
    once. Either dimension of ``out`` may be the contiguous one.
    """
    from bitsandbytes.functional import dequantize_blockwise

    scales = weight.scales
    if weight.scale_table is not None:
        scales = dequantize_blockwise(weight.scales, weight.state.state2).float() + weight.scale_offset
    nibbles = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1).view(-1).int()
    values = weight.table[nibbles].view(-1, weight.block_size) * scales.view(-1, 1)
    values = values.view(weight.outputs, weight.inputs)
    if adapter is not None:
        values = values + adapter.scale * (adapter.b.float() @ adapter.a.float())
    out.copy_(values)


def norm_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of the rows of ``x`` (T, h): (y, 1/rms as float32 (T)). ``offset`` is added to the weight
    (Gemma: 1).
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return _scale_normed(wide, weight, rstd, offset, x.dtype), rstd


def norm_again(x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float) -> torch.Tensor:
    """The normed rows again, from the ``rstd`` that ``norm_forward`` gave."""
    return _scale_normed(x.float(), weight, rstd, offset, x.dtype)


def norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    into: torch.Tensor,
) -> None:
    """Add the gradient with respect to ``x`` to ``into`` (T, h), given the gradient of the normed rows."""
    normed = x.float() * rstd[:, None]
    scaled = grad.float() * (weight.float() + offset)
    inner = (scaled * normed).mean(-1, keepdim=True)
    into.add_((rstd[:, None] * (scaled - normed * inner)).to(into.dtype))


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, *, backward: bool = False
) -> None:
    """Rotary position embedding of ``x`` (T, heads, head_dim) into ``out``, which may be ``x``; either may be
    strided.

    ``cos`` and ``sin`` are (T, d) with d at most head_dim, each half the same (Su et al. 2021, in
    transformers' half-split form); features from d on are copied. ``backward`` rotates the other way, which
    is the gradient.
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:].clone()
    first, second = turned.chunk(2, dim=-1)
    sine = -sin.float()[:, None] if backward else sin.float()[:, None]
    out[..., :width] = (turned * cos.float()[:, None] + torch.cat((-second, first), -1) * sine).to(out.dtype)
    out[..., width:] = rest


def gate_forward(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """``act(gate) · up`` (T, i) of the halves of ``gate_up`` (T, 2i)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (_activate(gate, activation) * up).to(gate_up.dtype)


def gate_backward(gate_up: torch.Tensor, grad: torch.Tensor, activation: Activation) -> None:
    """In place: ``grad`` (T, i), the gradient of the product, becomes the product; ``gate_up`` becomes its
    gradient.
    """
    with torch.enable_grad():
        halves = gate_up.float().detach().requires_grad_()
        gate, up = halves.chunk(2, dim=-1)
        product = _activate(gate, activation) * up
    (gradient,) = torch.autograd.grad(product, halves, grad.float())
    gate_up.copy_(gradient)
    grad.copy_(product.detach())


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, ignored: int, *, gradient: bool
) -> None:
    """Write each row's cross-entropy to ``losses`` (T), float32, 0 where the label is ``ignored``.

    With ``gradient`` the logits (T, V) become the gradient of the losses' sum.
    """
    wide = logits.float()
    losses.copy_(F.cross_entropy(wide, labels, ignore_index=ignored, reduction="none"))
    if gradient:
        kept = labels != ignored
        change = wide.softmax(-1)
        change[torch.arange(len(labels)), labels.clamp_min(0)] -= 1
        logits.copy_(change * kept[:, None])


def _scale_normed(
    wide: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float, dtype: torch.dtype
) -> torch.Tensor:
    normed = wide * rstd[:, None]
    if offset:  # Gemma multiplies in float32, the others in the input's dtype
        return (normed * (weight.float() + offset)).to(dtype)
    return normed.to(dtype) * weight.to(dtype)


def _activate(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
