"""The flat optimizer against torch's AdamW and bitsandbytes' 8-bit one, and a resumed run against an unbroken
one.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch

from adapterhub.trainer.fast.flat import FlatAdapters, flatten
from adapterhub.trainer.fast.optimizer import FlatAdamW

SHAPES = ((4, 64), (128, 4), (3, 1001), (64, 128))


def adapters(dtype: torch.dtype = torch.bfloat16) -> tuple[list[torch.nn.Parameter], FlatAdapters]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return parameters, flatten(parameters, dtype, torch.device("cpu"), paged=False)


def gradients(step: int) -> list[torch.Tensor]:
    torch.manual_seed(100 + step)
    return [torch.randn(shape) * 3.0 ** -(step % 4) for shape in SHAPES]


def fill(flat: FlatAdapters, parameters: list[torch.nn.Parameter], step: int) -> None:
    for parameter, gradient in zip(parameters, gradients(step), strict=True):
        flat.gradient_view(parameter).add_(gradient)


def test_it_steps_as_torchs_adamw_with_clipping() -> None:
    parameters, flat = adapters()
    twins = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    expected = torch.optim.AdamW(twins, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = FlatAdamW(flat, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=0.5)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (expected, optimizer)]
    for step in range(10):
        for twin, gradient in zip(twins, gradients(step), strict=True):
            twin.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(twins, 0.5)
        fill(flat, parameters, step)
        expected.step()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
        assert not flat.gradient.any()
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter.data, twin.data)
        assert torch.equal(flat.compute_view(parameter), parameter.bfloat16())


def test_eight_bit_moments_are_those_of_bitsandbytes() -> None:
    """One tensor of whole blocks, so that bitsandbytes' optimizer scales the same weights together."""
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(64, 256))
    flat = flatten([parameter], torch.bfloat16, torch.device("cpu"), paged=False)
    twin = torch.nn.Parameter(parameter.detach().clone())
    expected: Any = AdamW8bit([twin], lr=1e-2, weight_decay=0.1, min_8bit_size=0)
    optimizer = FlatAdamW(flat, lr=1e-2, weight_decay=0.1, bits=8)
    for step in range(5):
        torch.manual_seed(step)
        twin.grad = torch.randn(64, 256)
        flat.gradient_view(parameter).copy_(twin.grad)
        expected.step()
        optimizer.step()
    torch.testing.assert_close(parameter.data, twin.data)
    assert torch.equal(optimizer.state[flat.master]["exp_avg"], expected.state[twin]["state1"].view(-1))


@pytest.mark.parametrize("bits", [8, 32])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(bits: Literal[8, 32]) -> None:
    whole, flat = adapters()
    unbroken = FlatAdamW(flat, lr=1e-2, max_grad_norm=1.0, bits=bits)
    for step in range(3):
        fill(flat, whole, step)
        unbroken.step()
    saved, weights = copy.deepcopy(unbroken.state_dict()), [p.detach().clone() for p in whole]
    for step in range(3, 6):
        fill(flat, whole, step)
        unbroken.step()

    parameters, other = adapters()
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    other.refresh()
    resumed = FlatAdamW(other, lr=1e-2, max_grad_norm=1.0, bits=bits)
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        fill(other, parameters, step)
        resumed.step()
    for parameter, expected in zip(parameters, whole, strict=True):
        assert torch.equal(parameter, expected)
        assert torch.equal(other.compute_view(parameter), flat.compute_view(expected))
