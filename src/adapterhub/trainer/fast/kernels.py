"""The fast path's elementwise operations as Triton kernels: same functions, same results as ``reference``.

Only imported on CUDA. The weights are frozen, so no kernel computes a weight's gradient; gate and up lie side
by side as their product left them; and the 4-bit weight takes its adapter in before it is rounded. General
kernel libraries do none of the three.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from adapterhub.trainer.fast.reference import Activation
from adapterhub.trainer.fast.weights import Adapter, FrozenWeight


@triton.jit
def _dequantize_kernel(
    codes, table, scales, scale_table, scale_scales, scale_offset, a, b, out,
    outputs, inputs, out_stride, rank, adapter_scale,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    NESTED: tl.constexpr, ADAPTED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One (ROWS, COLUMNS) tile of the weight; COLUMNS is a multiple of BLOCK. TRANSPOSED: it is stored with
    the rows side by side, ``out_stride`` apart from column to column.
    """
    pairs: tl.constexpr = COLUMNS // 2
    blocks: tl.constexpr = COLUMNS // BLOCK
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS
    row_in = row < outputs
    pair = column // 2 + tl.arange(0, pairs)
    at = row[:, None].to(tl.int64) * (inputs // 2) + pair[None, :]
    packed = tl.load(codes + at, mask=row_in[:, None] & (pair[None, :] < inputs // 2), other=0)
    first = tl.load(table + (packed >> 4).to(tl.int32))
    second = tl.load(table + (packed & 15).to(tl.int32))

    block = column // BLOCK + tl.arange(0, blocks)
    block_at = row[:, None].to(tl.int64) * (inputs // BLOCK) + block[None, :]
    block_in = row_in[:, None] & (block[None, :] < inputs // BLOCK)
    if NESTED:
        code = tl.load(scales + block_at, mask=block_in, other=0).to(tl.int32)
        outer = tl.load(scale_scales + block_at // 256, mask=block_in, other=0.0)
        scale = tl.load(scale_table + code) * outer + tl.load(scale_offset)
    else:
        scale = tl.load(scales + block_at, mask=block_in, other=0.0)
    spread = tl.broadcast_to(scale[:, :, None], (ROWS, blocks, BLOCK // 2))
    spread = tl.reshape(spread, (ROWS, pairs))
    values = tl.interleave(first * spread, second * spread)

    columns = column + tl.arange(0, COLUMNS)
    inside = row_in[:, None] & (columns[None, :] < inputs)
    if ADAPTED:
        ranks = tl.arange(0, RANK)
        left = tl.load(
            b + row[:, None] * rank + ranks[None, :],
            mask=row_in[:, None] & (ranks[None, :] < rank),
            other=0.0,
        )
        right = tl.load(
            a + ranks[:, None] * inputs + columns[None, :],
            mask=(ranks[:, None] < rank) & (columns[None, :] < inputs),
            other=0.0,
        )
        values += adapter_scale * tl.dot(left, right, input_precision="ieee")
    rounded = values.to(out.dtype.element_ty)
    if TRANSPOSED:
        tl.store(
            out + columns[:, None].to(tl.int64) * out_stride + row[None, :],
            tl.trans(rounded),
            mask=(columns[:, None] < inputs) & row_in[None, :],
        )
    else:
        tl.store(out + row[:, None].to(tl.int64) * out_stride + columns[None, :], rounded, mask=inside)


def dequantize(weight: FrozenWeight, out: torch.Tensor, adapter: Adapter | None) -> None:
    """See ``reference.dequantize``."""
    if weight.inputs % weight.block_size or (adapter is not None and adapter.a.shape[0] > 256):
        _dequantize_apart(weight, out, adapter)
        return
    nested = weight.scale_table is not None
    # Without fused multiply-adds the scales, and so the weights, are bit for bit those of bitsandbytes.
    rank = adapter.a.shape[0] if adapter is not None else 16
    padded = max(16, triton.next_power_of_2(rank))
    rows, columns, warps = _dequantize_tile(padded if adapter is not None else 0)
    columns = max(columns, weight.block_size)
    grid = (triton.cdiv(weight.outputs, rows), triton.cdiv(weight.inputs, columns))
    unused = weight.table
    transposed = out.stride(1) != 1
    stride = out.stride(1 if transposed else 0)
    _dequantize_kernel[grid](
        weight.codes, weight.table, weight.scales,
        weight.scale_table if nested else unused, weight.scale_scales if nested else unused,
        weight.scale_offset if nested else unused,
        adapter.a if adapter is not None else out, adapter.b if adapter is not None else out, out,
        weight.outputs, weight.inputs, stride, rank, adapter.scale if adapter is not None else 0.0,
        BLOCK=weight.block_size, ROWS=rows, COLUMNS=columns, RANK=padded,
        NESTED=nested, ADAPTED=adapter is not None, TRANSPOSED=transposed,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


def _dequantize_tile(rank: int) -> tuple[int, int, int]:
    """Rows, columns, warps of a block of weights: the fastest of ten on an H200 (benchmarks/kernel_speed)."""
    if rank == 0:
        return 64, 128, 8
    return (64, 64, 4) if rank <= 64 else (32, 64, 8)


def _dequantize_apart(weight: FrozenWeight, out: torch.Tensor, adapter: Adapter | None) -> None:
    """For weights whose rows are no whole blocks, and for very large ranks: two steps, rounded twice."""
    from bitsandbytes.functional import dequantize_4bit

    values = dequantize_4bit(weight.codes.view(-1, 1), weight.state)
    if adapter is None:
        out.copy_(values)
    else:
        out.copy_(torch.addmm(values.to(out.dtype), adapter.b, adapter.a, alpha=adapter.scale))


@triton.jit
def _norm_kernel(
    x, weight, y, rstd, width, eps, offset, WIDTH: tl.constexpr, GIVEN: tl.constexpr, GEMMA: tl.constexpr
):
    """One row: normed and scaled; its 1/rms is computed and stored, or GIVEN."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        inverse = tl.load(rstd + row)
    else:
        inverse = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
        tl.store(rstd + row, inverse)
    scale = tl.load(weight + at, mask=inside, other=0.0)
    normed = values * inverse
    if GEMMA:
        result = normed * (scale.to(tl.float32) + offset)
    else:
        rounded = normed.to(y.dtype.element_ty).to(tl.float32)
        result = rounded * scale.to(tl.float32)
    tl.store(y + row * width + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(grad, x, weight, rstd, into, width, offset, WIDTH: tl.constexpr):
    """One row of ``norm_backward``."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
    so_far = tl.load(into + row * width + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(rstd + row)
    normed = values * inverse
    scaled = change * scale
    inner = tl.sum(scaled * normed, axis=0) / width
    result = so_far + inverse * (scaled - normed * inner)
    tl.store(into + row * width + at, result.to(into.dtype.element_ty), mask=inside)


def norm_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.norm_forward``."""
    y, rstd = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch_norm(x, weight, y, rstd, eps, offset, given=False)
    return y, rstd


def norm_again(x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float) -> torch.Tensor:
    """See ``reference.norm_again``."""
    y = torch.empty_like(x)
    _launch_norm(x, weight, y, rstd, 0.0, offset, given=True)
    return y


def norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    into: torch.Tensor,
) -> None:
    """See ``reference.norm_backward``."""
    rows, width = x.shape
    wide = triton.next_power_of_2(width)
    _norm_backward_kernel[(rows,)](
        grad, x, weight, rstd, into, width, offset, WIDTH=wide, num_warps=_warps(wide)
    )


def _launch_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    rstd: torch.Tensor,
    eps: float,
    offset: float,
    *,
    given: bool,
) -> None:
    rows, width = x.shape
    wide = triton.next_power_of_2(width)
    _norm_kernel[(rows,)](
        x, weight, y, rstd, width, eps, offset,
        WIDTH=wide, GIVEN=given, GEMMA=offset != 0, num_warps=_warps(wide),
    )  # fmt: skip


def _warps(wide: int) -> int:
    return min(16, max(1, wide // 512))


@triton.jit
def _rotate_kernel(
    x, cos, sin, out, x_token, x_head, out_token, out_head, heads, head_dim, half, cos_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    inside = (head[:, None] < heads) & (at[None, :] < half)
    cosine = tl.load(cos + token * cos_stride + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + token * cos_stride + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        sine = -sine
    source = x + token * x_token + head[:, None] * x_head + at[None, :]
    target = out + token * out_token + head[:, None] * out_head + at[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(target + half, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)
    if REST > 0:
        left = 2 * half + tl.arange(0, REST)
        there = (head[:, None] < heads) & (left[None, :] < head_dim)
        rest = tl.load(x + token * x_token + head[:, None] * x_head + left[None, :], mask=there, other=0.0)
        tl.store(out + token * out_token + head[:, None] * out_head + left[None, :], rest, mask=there)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, *, backward: bool = False
) -> None:
    """See ``reference.rotate``."""
    tokens, heads, head_dim = x.shape
    half = cos.shape[-1] // 2
    rest = head_dim - 2 * half
    _rotate_kernel[(tokens,)](
        x, cos, sin, out, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        heads, head_dim, half, cos.stride(0),
        HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(max(1, half)),
        REST=triton.next_power_of_2(rest) if rest else 0, BACKWARD=backward, num_warps=4,
    )  # fmt: skip


@triton.jit
def _activated(gate, SILU: tl.constexpr):
    """The activation and its derivative."""
    if SILU:
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid * (1 + gate * (1 - sigmoid))
    else:
        cubic = 0.044715 * gate * gate * gate
        inner = 0.7978845608028654 * (gate + cubic)
        tanh = 2 * tl.sigmoid(2 * inner) - 1
        value = 0.5 * gate * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * 0.7978845608028654 * (
            1 + 3 * 0.044715 * gate * gate
        )
    return value, slope


@triton.jit
def _gate_kernel(gate_up, product, width, SILU: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activated(gate, SILU)
    tl.store(product + row * width + at, (value * up).to(product.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(gate_up, grad, width, SILU: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    gate_at, up_at, grad_at = (
        gate_up + row * 2 * width + at,
        gate_up + row * 2 * width + width + at,
        grad + row * width + at,
    )
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activated(gate, SILU)
    tl.store(gate_at, (change * up * slope).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(up_at, (change * value).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_at, (value * up).to(grad.dtype.element_ty), mask=inside)


def gate_forward(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """See ``reference.gate_forward``."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    _gate_kernel[(rows, triton.cdiv(width, 1024))](
        gate_up, product, width, SILU=activation == "silu", SIZE=1024
    )
    return product


def gate_backward(gate_up: torch.Tensor, grad: torch.Tensor, activation: Activation) -> None:
    """See ``reference.gate_backward``."""
    rows, width = grad.shape
    _gate_backward_kernel[(rows, triton.cdiv(width, 1024))](
        gate_up, grad, width, SILU=activation == "silu", SIZE=1024
    )


@triton.jit
def _cross_entropy_kernel(
    logits, labels, losses, ignored, WIDTH: tl.constexpr, SIZE: tl.constexpr, GRADIENT: tl.constexpr
):
    """One row, twice over: the log-sum-exp in one pass (Milakov and Gimelshein 2018), then the gradient in
    place.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counts = tl.where(label == ignored, 0.0, 1.0)
    label = tl.where(label == ignored, 0, label)
    start = logits + row * WIDTH
    largest = -float("inf")
    total = 0.0
    for begin in range(0, WIDTH, SIZE):
        at = begin + tl.arange(0, SIZE)
        values = tl.load(start + at, mask=at < WIDTH, other=-float("inf")).to(tl.float32)
        here = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - here) + tl.sum(tl.exp(values - here), axis=0)
        largest = here
    log_sum = largest + tl.log(total)
    tl.store(losses + row, counts * (log_sum - tl.load(start + label).to(tl.float32)))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit is read before it is overwritten
        for begin in range(0, WIDTH, SIZE):
            at = begin + tl.arange(0, SIZE)
            values = tl.load(start + at, mask=at < WIDTH, other=-float("inf")).to(tl.float32)
            change = counts * (tl.exp(values - log_sum) - tl.where(at == label, 1.0, 0.0))
            tl.store(start + at, change.to(logits.dtype.element_ty), mask=at < WIDTH)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, ignored: int, *, gradient: bool
) -> None:
    """See ``reference.cross_entropy``."""
    rows, width = logits.shape
    _cross_entropy_kernel[(rows,)](
        logits, labels, losses, ignored,
        WIDTH=width, SIZE=min(8192, triton.next_power_of_2(width)), GRADIENT=gradient, num_warps=16,
    )  # fmt: skip
