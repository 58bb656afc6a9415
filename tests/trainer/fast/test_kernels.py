"""The Triton kernels against their definitions in plain torch, on random inputs of odd sizes.

Needs a GPU, or Triton's interpreter: ``TRITON_INTERPRET=1 pytest -m gpu tests/trainer/fast/test_kernels.py``.
"""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from adapterhub.trainer.fast import reference  # noqa: E402
from adapterhub.trainer.fast.weights import Adapter, FrozenWeight, frozen_weight  # noqa: E402

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# bf16 keeps 8 bits: one rounding moves a value by at most 2⁻⁹ of it (2⁻⁸ in the interpreter, which
# truncates). What is rounded twice stays within 2⁻⁶, and what is near zero within the rounding of the terms
# it is the sum of.
CLOSE = {"rtol": 2**-6, "atol": 2**-7}


@pytest.fixture
def kernels() -> ModuleType:
    from adapterhub.trainer.fast import kernels

    return kernels


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def quantized(outputs: int, inputs: int, kind: str, double: bool) -> FrozenWeight:
    from bitsandbytes.functional import QuantState, quantize_4bit

    codes, state = quantize_4bit(
        torch.randn(outputs, inputs, device=DEVICE, dtype=torch.bfloat16) / 10,
        blocksize=64, quant_type=kind, compress_statistics=double,
    )  # fmt: skip
    assert isinstance(state, QuantState)
    module = type("Module", (), {"weight": codes})
    module.weight.quant_state = state
    return frozen_weight(module)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"), [(192, 256, 0), (100, 192, 16), (65, 320, 3), (64, 64, 128)]
)
def test_dequantize(
    kernels: ModuleType, kind: str, double: bool, outputs: int, inputs: int, rank: int, transposed: bool
) -> None:
    weight = quantized(outputs, inputs, kind, double)
    adapter = None
    if rank:
        dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16  # the interpreter cannot multiply bf16
        a, b = draw(rank, inputs, dtype=dtype), draw(outputs, rank, dtype=dtype)
        adapter = Adapter(a, b, torch.empty(0), torch.empty(0), 0.05, 0.0)
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    wide = torch.full((rows, columns + 64), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    out = wide[:, :columns].t() if transposed else wide[:, :columns]
    expected = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=DEVICE)
    kernels.dequantize(weight, out, adapter)
    reference.dequantize(weight, expected, adapter)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-4)
    assert wide[:, columns:].isnan().all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", [64, 576, 100])
def test_norm(kernels: ModuleType, width: int, offset: float) -> None:
    x, weight, grad, into = draw(5, width), draw(width), draw(5, width), draw(5, width)
    y, rstd = kernels.norm_forward(x, weight, 1e-5, offset)
    expected, expected_rstd = reference.norm_forward(x, weight, 1e-5, offset)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(rstd, expected_rstd)
    torch.testing.assert_close(kernels.norm_again(x, weight, rstd, offset), y, rtol=0, atol=0)
    other = into.clone()
    kernels.norm_backward(grad, x, weight, rstd, offset, into)
    reference.norm_backward(grad, x, weight, rstd, offset, other)
    torch.testing.assert_close(into, other, **CLOSE)


@pytest.mark.parametrize(("heads", "head_dim", "turned"), [(4, 64, 64), (3, 48, 48), (2, 96, 72), (3, 64, 0)])
@pytest.mark.parametrize("backward", [False, True])
def test_rotate(kernels: ModuleType, heads: int, head_dim: int, turned: int, backward: bool) -> None:
    qkv = draw(7, heads * head_dim + 32)
    x = qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    angle = torch.randn(7, turned // 2, device=DEVICE)
    cos, sin = (torch.cat((f(angle), f(angle)), -1).bfloat16() for f in (torch.cos, torch.sin))
    expected, out = torch.empty_like(x), torch.empty_like(x)
    reference.rotate(x, cos, sin, expected, backward=backward)
    kernels.rotate(x, cos, sin, out, backward=backward)
    torch.testing.assert_close(out, expected, **CLOSE)
    rest = qkv[:, heads * head_dim :].clone()
    kernels.rotate(x, cos, sin, x, backward=backward)
    torch.testing.assert_close(x, expected, **CLOSE)
    assert torch.equal(qkv[:, heads * head_dim :], rest)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [96, 1500])
def test_gate(kernels: ModuleType, activation: reference.Activation, width: int) -> None:
    gate_up, grad = draw(5, 2 * width), draw(5, width)
    torch.testing.assert_close(
        kernels.gate_forward(gate_up, activation), reference.gate_forward(gate_up, activation), **CLOSE
    )
    expected, expected_product = gate_up.clone(), grad.clone()
    reference.gate_backward(expected, expected_product, activation)
    kernels.gate_backward(gate_up, grad, activation)
    torch.testing.assert_close(gate_up, expected, **CLOSE)
    torch.testing.assert_close(grad, expected_product, **CLOSE)


@pytest.mark.parametrize("vocabulary", [50, 1024, 9000])
def test_cross_entropy(kernels: ModuleType, vocabulary: int) -> None:
    logits = 3 * draw(6, vocabulary)
    labels = torch.randint(0, vocabulary, (6,), device=DEVICE)
    labels[2] = -100
    losses, expected = torch.empty(6, device=DEVICE), torch.empty(6, device=DEVICE)
    other = logits.clone()
    kernels.cross_entropy(logits.clone(), labels, losses, -100, gradient=False)
    reference.cross_entropy(other.clone(), labels, expected, -100, gradient=False)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    kernels.cross_entropy(logits, labels, losses, -100, gradient=True)
    reference.cross_entropy(other, labels, expected, -100, gradient=True)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, other, rtol=2**-7, atol=1e-5)
    assert (logits[2] == 0).all()
