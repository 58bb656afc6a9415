"""Gradients of an adapter by peft and by a path of ours, and when they count as equal."""

from __future__ import annotations

from typing import Any

import torch

# fp32 keeps 24 bits (2⁻²⁴ ≈ 6e-8 a rounding). Gradients here are sums of up to 500 terms taken in another
# order, through three layers: some 1500 roundings, 1500 · 6e-8 ≈ 1e-4 of the largest term at the worst.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plain_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in trained(model).items()}


def fast_gradients(
    model: Any, path: Any, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """By ``path`` (a FastPath or LinearsPath), whose buffer is cleared."""
    loss = model(**path.prepare(inputs)).loss
    loss.backward()
    found = {name: path.flat.gradient_view(parameter).clone() for name, parameter in trained(model).items()}
    path.flat.gradient.zero_()
    return loss.detach(), found


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=lambda text, n=name: f"{n}: {text}")
        assert gradient.abs().max() > 0
