"""The fast path against peft's own modules in fp32: same loss, same gradients, same training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapterhub.trainer.fast.install import FastPath, install_blocks
from adapterhub.trainer.ledger import Setting

from .conftest import ARCHITECTURES

# fp32 keeps 24 bits; sums over at most 300 terms in another order, through three layers, stay within 2⁻¹⁴ of the
# largest term.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def setting(*, whole: int = 0, mlp: int = 0) -> Setting:
    return Setting(2, "adamw", "fast", recompute_all=whole, recompute_mlp=mlp)


def batch(rows: int = 2, vocabulary: int = 300) -> dict[str, torch.Tensor]:
    """Packed rows of 24 tokens: sequences of 9, 11 and 4, the last standing for padding, without loss."""
    ids = torch.randint(0, vocabulary, (rows, 24))
    positions = torch.cat([torch.arange(9), torch.arange(11), torch.arange(4)]).repeat(rows, 1)
    labels = ids.clone()
    labels[:, :3] = labels[:, 9:12] = labels[:, 20:] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def install(model: Any, chosen: Setting) -> FastPath:
    return install_blocks(model.get_base_model(), chosen, torch.float32, torch.device("cpu"))


def plain_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def fast_gradients(
    model: Any, fast: FastPath, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**FastPath.prepare(inputs)).loss
    loss.backward()
    names = {n: p for n, p in model.named_parameters() if id(p) in fast.flat.views}
    return loss.detach(), {name: fast.flat.gradient_view(parameter) for name, parameter in names.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_peft(quantized_model: Callable[..., Any], architecture: str) -> None:
    model, inputs = quantized_model(architecture), batch()
    loss, expected = plain_gradients(model, inputs)
    fast = install(model, setting(whole=1, mlp=1))
    fast_loss, gradients = fast_gradients(model, fast, inputs)
    torch.testing.assert_close(fast_loss, loss, **CLOSE)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=lambda text, n=name: f"{n}: {text}")
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("chosen", [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_recomputation_changes_no_gradient(quantized_model: Callable[..., Any], chosen: tuple[int, int]) -> None:
    inputs = batch()
    reference = quantized_model("llama")
    _, expected = fast_gradients(reference, install(reference, setting()), inputs)
    model = quantized_model("llama")
    _, gradients = fast_gradients(model, install(model, setting(whole=chosen[0], mlp=chosen[1])), inputs)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
