"""The fast path on CUDA: products, attention, whole models and steps, against fp32 references and peft.

bf16 keeps 8 bits. What is compared is ‖found − reference‖ / ‖reference‖ over a whole tensor: rounding the
operands of a long product leaves 2⁻⁹ to 2⁻⁸ of it, and a few such products in a row up to 2⁻⁶.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub.trainer.activations import Setting
from adapterhub.trainer.fast.attention import Sequences, attend, attend_backward
from adapterhub.trainer.fast.install import FastPath, install_blocks, install_linears
from adapterhub.trainer.fast.products import _accumulate
from adapterhub.trainer.fast.weights import frozen_weight
from adapterhub.trainer.recipe import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Make = Callable[..., Any]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _few_gigabytes() -> Iterator[None]:
    """No test takes more than 8 GiB, nor leaves any behind."""
    torch.cuda.set_per_process_memory_fraction(8 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    wide = expected.double().cpu()
    return float((found.double().cpu() - wide).norm() / wide.norm())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantized_weights_are_bit_for_bit_those_of_bitsandbytes(kind: str, double: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from adapterhub.trainer.fast import kernels

    linear = Linear4bit(
        1536, 2176, bias=False, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type=kind
    )
    torch.nn.init.normal_(linear.weight, std=0.02)
    linear = linear.to(torch.bfloat16).to(CUDA)
    out = torch.full((2176, 1536), float("nan"), dtype=torch.bfloat16, device=CUDA)
    kernels.dequantize(frozen_weight(linear), out, None)
    expected = dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(torch.bfloat16)
    assert torch.equal(out, expected.view_as(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thin_products_are_summed_in_fp32(dtype: torch.dtype) -> None:
    left, right = (
        torch.randn(4096, 320, device=CUDA, dtype=dtype),
        torch.randn(4096, 64, device=CUDA, dtype=dtype),
    )
    total = torch.randn(128, 64, device=CUDA)
    expected = total.double() + 0.25 * left[:, 64:192].double().t() @ right.double()
    _accumulate(total, left[:, 64:192].t(), right, 0.25)
    assert error(total, expected) < 1e-5


def sequences(*lengths: int) -> Sequences:
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
    return Sequences(starts, max(lengths))


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim", "window"),
    [
        ((512, 512), 4, 4, 128, None),  # cuDNN's kernels on Hopper
        ((256, 256, 256), 6, 2, 64, None),
        ((100, 300, 7), 4, 4, 64, None),
        ((256, 513), 4, 2, 128, None),
        ((300, 40), 4, 2, 96, 64),
        ((64,), 4, 1, 256, None),
    ],
)
def test_attention_and_its_gradients(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    tokens, scale = sum(lengths), head_dim**-0.5
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=torch.bfloat16)
    grad = torch.randn(tokens, heads, head_dim, dtype=torch.bfloat16)
    here = sequences(*lengths)

    def run(qkv: torch.Tensor, grad: torch.Tensor, where: Sequences) -> list[torch.Tensor]:
        parts = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
        q, k, v = (part.unflatten(1, (-1, head_dim)) for part in parts)
        kept = attend(q, k, v, where, scale, window)
        return [kept.out, *attend_backward(grad, q, k, v, kept, where, scale, window)]

    expected = run(qkv.float(), grad.float(), here)
    found = run(qkv.to(CUDA), grad.to(CUDA), Sequences(here.starts.to(CUDA), here.longest))
    for tensor, reference in zip(found, expected, strict=True):
        assert tensor.shape == reference.shape
        assert error(tensor, reference) < 2**-6


def gradients(model: Any, fast: FastPath, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    loss = model(**move(FastPath.prepare(inputs), fast.flat.gradient.device)).loss
    loss.backward()
    found = fast.flat.gradient.clone()
    fast.flat.gradient.zero_()
    return loss.detach(), found


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.pin_memory().to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def install(
    model: Any, *, device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16, **more: Any
) -> FastPath:
    optimizer = more.pop("optimizer", "adamw")
    return install_blocks(model.get_base_model(), Setting(2, optimizer, "fast", **more), dtype, device)


def peft_gradients(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """By peft's own modules under bf16 autocast, in the order of the flat buffer."""
    from adapterhub.trainer.fast import adapt

    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**move(inputs, CUDA), use_cache=False).loss
    loss.backward()
    parameters = adapt.adapter_parameters(model.get_base_model().model.layers)
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_gradients_are_as_near_to_fp32_as_pefts(
    quantized_model: Make, packed_batch: Make, architecture: str
) -> None:
    inputs = packed_batch(rows=4)
    exact = quantized_model(architecture)
    loss, expected = gradients(exact, install(exact, device=torch.device("cpu"), dtype=torch.float32), inputs)
    plain = quantized_model(architecture, device="cuda", dtype=torch.bfloat16)
    theirs = error(peft_gradients(plain, inputs), expected)
    model = quantized_model(architecture, device="cuda", dtype=torch.bfloat16)
    found_loss, found = gradients(model, install(model, recompute_all=1, recompute_mlp=1), inputs)
    ours = error(found, expected)
    print(f"{architecture}: gradients off by {ours:.4f}, peft's by {theirs:.4f}")
    assert abs(float(found_loss) - float(loss)) < 0.02 * float(loss)
    assert ours < max(1.3 * theirs, 2**-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_in_transformers_own_layers_gradients_are_as_near(
    quantized_model: Make, packed_batch: Make, foreign_architecture: str, recompute: bool
) -> None:
    inputs, setting = packed_batch(rows=4), Setting(2, "paged_adamw", "linears")
    exact = quantized_model(foreign_architecture)
    path = install_linears(exact.get_base_model(), setting, torch.float32, torch.device("cpu"))
    exact(**path.prepare(inputs)).loss.backward()
    plain = quantized_model(foreign_architecture, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        plain(**move(inputs, CUDA), use_cache=False).loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    model = quantized_model(foreign_architecture, device="cuda", dtype=torch.bfloat16)
    ours = install_linears(model.get_base_model(), setting, torch.bfloat16, CUDA)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    optimizer = ours.optimizer(RECIPE, setting)
    for step in range(8):
        loss = model(**move(ours.prepare(inputs), CUDA)).loss
        loss.backward()
        if step == 0:
            found = torch.cat([ours.flat.gradient_view(p).flatten() for p in ours.flat.parameters])
            wanted = torch.cat([path.flat.gradient_view(p).flatten() for p in path.flat.parameters])
            assert error(found, wanted) < max(1.3 * error(theirs, wanted), 2**-6)
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_and_offloading_change_no_gradient(
    quantized_model: Make, packed_batch: Make, dropout: float
) -> None:
    inputs, results = packed_batch(rows=4), []
    for more in (
        {},
        {"recompute_all": 4},
        {"recompute_all": 4, "offload": True},
        {"recompute_all": 1, "kept_weights": 3},
        {"recompute_all": 1, "offload": True},
    ):
        model = quantized_model("llama wide", device="cuda", dtype=torch.bfloat16, dropout=dropout)
        fast = install(model, **more)
        for _ in range(2):
            torch.manual_seed(5)
            results.append(gradients(model, fast, inputs)[1])
    # Flash attention adds the query's gradient up in no fixed order, so that bits may differ from run to run.
    assert all(error(result, results[0]) < 2**-8 for result in results)


RECIPE = Recipe.from_dict({"name": "r", "base": "b", "data": {"train": "t"}}, Path())


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_step_waits_for_nothing_and_trains(
    quantized_model: Make, packed_batch: Make, optimizer: str, offload: bool
) -> None:
    """The host is never made to wait within a step; paged optimizers end theirs waiting for copies."""
    model = quantized_model("llama wide", device="cuda", dtype=torch.bfloat16)
    fast = install(model, optimizer=optimizer, recompute_all=2, recompute_mlp=1, offload=offload)
    steps = fast.optimizer(RECIPE, Setting(2, optimizer, "fast"))  # type: ignore[arg-type]
    inputs = FastPath.prepare(packed_batch(rows=4))
    losses = []
    for step in range(12):
        batch = move(inputs, CUDA)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        try:
            loss = model(**batch).loss
            loss.backward()
            if optimizer != "adamw":  # its step waits: the host may read paged weights after it
                torch.cuda.set_sync_debug_mode("default")
            steps.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(loss.detach())
    assert losses[-1] < losses[0]


def test_paging_changes_no_weight(quantized_model: Make, packed_batch: Make) -> None:
    weights = []
    for optimizer in ("adamw", "paged_adamw"):
        model = quantized_model("llama wide", device="cuda", dtype=torch.bfloat16)
        fast = install(model, optimizer=optimizer)
        steps = fast.optimizer(RECIPE, Setting(2, optimizer, "fast"))  # type: ignore[arg-type]
        for step in range(3):
            torch.manual_seed(step)
            fast.flat.gradient.copy_(torch.randn(fast.flat.gradient.shape))
            steps.step()
        assert fast.flat.paged == (optimizer == "paged_adamw")
        weights.append(fast.flat.master.detach().cpu())
        assert torch.equal(fast.flat.compute.cpu(), weights[-1].bfloat16())
    torch.testing.assert_close(weights[1], weights[0])
    fast.remove()
    ids = packed_batch()["input_ids"].to(CUDA)
    assert model(input_ids=ids).logits.isfinite().all()
