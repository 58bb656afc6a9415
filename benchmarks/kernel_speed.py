"""The fast path's kernels one by one at a 7B layer's sizes: milliseconds, and bytes or operations a second.

Finds which of them is far from what the device can do, and which tile the dequantization should take. Needs a
CUDA device::

    python benchmarks/kernel_speed.py [--tokens 8192] [--out benchmarks/results/kernel_speed.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, RANK, VOCABULARY = 4096, 11008, 32, 128, 64, 32000
LENGTH = 2048
CUDA = torch.device("cuda")
# name, work, bytes moved at the least, floating-point operations
Case = tuple[str, Callable[[], Any], float, float]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for group in (copies, dequantization, elementwise, products, attention):
        try:
            for name, work, moved, operations in group(options.tokens):
                results.append(measure(name, work, moved, operations))
                print(
                    f"{name:52} {results[-1]['ms']:8.4f} ms {results[-1]['tb_per_s']:6.2f} TB/s "
                    f"{results[-1]['tflops']:6.0f} TFLOP/s",
                    flush=True,
                )
        except Exception:
            traceback.print_exc()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": options.tokens}
        options.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    return 0


def measure(name: str, work: Callable[[], Any], moved: float, operations: float) -> dict[str, Any]:
    """The median of some 30 ms of runs, the cache cleared between them."""
    from triton.testing import do_bench

    ms = do_bench(work, warmup=10, rep=30, return_mode="median")
    return {
        "name": name,
        "ms": ms,
        "tb_per_s": round(moved / ms / 1e9, 3),
        "tflops": round(operations / ms / 1e9, 1),
    }


def copies(tokens: int) -> Iterator[Case]:
    source = draw(tokens, 2 * INTERMEDIATE)
    target = torch.empty_like(source)
    yield "copy", lambda: target.copy_(source), 2 * source.nbytes, 0
    left, right = draw(8192, 8192), draw(8192, 8192)
    yield "product 8192 x 8192 x 8192", lambda: torch.mm(left, right), 0, 2 * 8192**3


def dequantization(tokens: int) -> Iterator[Case]:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from synthetic_model import _fill

    from adapterhub.trainer.fast import kernels
    from adapterhub.trainer.fast.weights import Adapter, frozen_weight

    with torch.device("meta"):
        linear = Linear4bit(HIDDEN, INTERMEDIATE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    _fill(linear, CUDA)
    weight = frozen_weight(linear)
    out = torch.empty(INTERMEDIATE, HIDDEN, dtype=torch.bfloat16, device=CUDA)
    a, b = draw(RANK, HIDDEN), draw(INTERMEDIATE, RANK)
    adapter = Adapter(a, b, a, b, 0.25, 0.0)
    moved, thin = 2.52 * out.numel(), 2.0 * RANK * out.numel()
    yield "dequantize", lambda: kernels.dequantize(weight, out, None), moved, 0
    yield "dequantize, adapter folded in", lambda: kernels.dequantize(weight, out, adapter), moved, thin
    flipped = torch.empty(HIDDEN, INTERMEDIATE, dtype=torch.bfloat16, device=CUDA).t()
    yield "dequantize, transposed", lambda: kernels.dequantize(weight, flipped, None), moved, 0
    yield "dequantize, folded, transposed", lambda: kernels.dequantize(weight, flipped, adapter), moved, thin
    state = linear.weight.quant_state
    yield "bitsandbytes' dequantize_4bit", lambda: dequantize_4bit(linear.weight.data, state), moved, 0
    tiles = ((64, 64, 4), (64, 64, 8), (64, 128, 4), (64, 128, 8), (128, 64, 4), (128, 64, 8), (128, 128, 8))
    for (rows, columns, warps), transposed in product(tiles, (False, True)):

        def run(
            rows: int = rows, columns: int = columns, warps: int = warps, transposed: bool = transposed
        ) -> None:
            target, stride = (flipped, INTERMEDIATE) if transposed else (out, HIDDEN)
            kernels._dequantize_kernel[(-(-INTERMEDIATE // rows), -(-HIDDEN // columns))](
                weight.codes, weight.table, weight.scales, weight.scale_table, weight.scale_scales,
                weight.scale_offset, a, b, target, INTERMEDIATE, HIDDEN, stride, RANK, 0.25,
                BLOCK=64, ROWS=rows, COLUMNS=columns, RANK=RANK, NESTED=True, ADAPTED=True,
                TRANSPOSED=transposed, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip

        how = "folded, transposed" if transposed else "folded in"
        yield f"  {how}, tile {rows} x {columns}, {warps} warps", run, moved, thin


def elementwise(tokens: int) -> Iterator[Case]:
    from adapterhub.trainer.fast import kernels

    x, weight, into = draw(tokens, HIDDEN), draw(HIDDEN), draw(tokens, HIDDEN)
    _, rstd = kernels.norm_forward(x, weight, 1e-5, 0.0)
    yield "norm", lambda: kernels.norm_forward(x, weight, 1e-5, 0.0), 2 * x.nbytes, 0
    yield "norm backward", lambda: kernels.norm_backward(x, x, weight, rstd, 0.0, into), 4 * x.nbytes, 0
    gate_up, grad = draw(tokens, 2 * INTERMEDIATE), draw(tokens, INTERMEDIATE)
    yield "gate", lambda: kernels.gate_forward(gate_up, "silu"), 1.5 * gate_up.nbytes, 0
    yield "gate backward", lambda: kernels.gate_backward(gate_up, grad, "silu"), 3 * gate_up.nbytes, 0
    qkv = draw(tokens, 3 * HIDDEN)
    heads = qkv[:, :HIDDEN].unflatten(1, (HEADS, HEAD_DIM))
    cos, sin = draw(tokens, HEAD_DIM), draw(tokens, HEAD_DIM)
    yield "rotate in place", lambda: kernels.rotate(heads, cos, sin, heads), 2 * x.nbytes, 0
    logits, losses = draw(1024, VOCABULARY), torch.empty(1024, device=CUDA)
    labels = torch.randint(0, VOCABULARY, (1024,), device=CUDA)
    yield (
        "cross-entropy of 1,024 tokens",
        lambda: kernels.cross_entropy(logits, labels, losses, -100, gradient=True),
        3 * logits.nbytes,
        0,
    )


def products(tokens: int) -> Iterator[Case]:
    from adapterhub.trainer.fast.products import _accumulate

    for outputs, inputs in (
        (3 * HIDDEN, HIDDEN),
        (HIDDEN, HIDDEN),
        (2 * INTERMEDIATE, HIDDEN),
        (HIDDEN, INTERMEDIATE),
    ):
        x, weight, grad = draw(tokens, inputs), draw(outputs, inputs), draw(tokens, outputs)
        operations, shape = 2.0 * tokens * inputs * outputs, f"{outputs} x {inputs}"
        yield f"{shape}: x Wt", lambda x=x, w=weight: torch.mm(x, w.t()), 0, operations
        yield f"{shape}: dy W", lambda g=grad, w=weight: torch.mm(g, w), 0, operations
        turned = weight.t().contiguous().t()
        yield f"{shape}: dy W, W transposed", lambda g=grad, w=turned: torch.mm(g, w), 0, operations
        a, b = draw(RANK, inputs), draw(outputs, RANK)
        inner, outer = draw(tokens, RANK), draw(tokens, RANK)
        total_a, total_b = torch.zeros(RANK, inputs, device=CUDA), torch.zeros(outputs, RANK, device=CUDA)
        thin_in, thin_out = 2.0 * tokens * inputs * RANK, 2.0 * tokens * outputs * RANK
        yield f"{shape}: thin dy B", lambda g=grad, b=b: torch.mm(g, b), grad.nbytes, thin_out
        yield f"{shape}: thin x At", lambda x=x, a=a: torch.mm(x, a.t()), x.nbytes, thin_in
        yield (
            f"{shape}: thin dB += dyt (x At), fp32",
            lambda t=total_b, g=grad, o=outer: _accumulate(t, g.t(), o, 1.0),
            grad.nbytes,
            thin_out,
        )
        yield (
            f"{shape}: thin dA += (dy B)t x, fp32",
            lambda t=total_a, i=inner, x=x: _accumulate(t, i.t(), x, 1.0),
            x.nbytes,
            thin_in,
        )
        flipped = total_a.t().contiguous()
        yield (
            f"{shape}: thin dAt += xt (dy B), fp32",
            lambda t=flipped, i=inner, x=x: _accumulate(t, x.t(), i, 1.0),
            x.nbytes,
            thin_in,
        )


def attention(tokens: int) -> Iterator[Case]:
    from adapterhub.trainer.fast import attention as kernel
    from adapterhub.trainer.fast.attention import Sequences, attend, attend_backward

    qkv = draw(tokens, 3 * HIDDEN)
    q, k, v = (part.unflatten(1, (HEADS, HEAD_DIM)) for part in qkv.split(HIDDEN, dim=1))
    grad = draw(tokens, HEADS, HEAD_DIM)
    scale = HEAD_DIM**-0.5
    for length, cudnn in ((LENGTH, True), (LENGTH, False), (512, True), (512, False)):
        starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=CUDA)
        here = Sequences(starts, length)
        chosen = kernel._equal
        operations = 2.0 * tokens * length * HIDDEN
        name = f"{'cuDNN' if cudnn else 'flash'}, sequences of {length}"

        def forward(here: Sequences = here, cudnn: bool = cudnn) -> Any:
            kernel._equal = lambda *_: cudnn
            return attend(q, k, v, here, scale, None)

        def backward(here: Sequences = here, cudnn: bool = cudnn, kept: Any = None) -> Any:
            kernel._equal = lambda *_: cudnn
            return attend_backward(grad, q, k, v, kept, here, scale, None)

        try:
            kept = forward()
            yield f"attention, {name}", forward, 0, operations
            yield (
                f"attention backward, {name}",
                lambda b=backward, kept=kept: b(kept=kept),
                0,
                2.5 * operations,
            )
        finally:
            kernel._equal = chosen


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=CUDA) * 0.05


if __name__ == "__main__":
    sys.exit(main())
