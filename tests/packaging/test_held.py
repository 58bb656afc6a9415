"""4-bit weights held dequantized: the same numbers, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.packaging.held import weights_held
from adapterhub.packaging.manifest import Quantization
from adapterhub.trainer.model import load_base


@pytest.mark.parametrize("quantization", [Quantization(), Quantization(type="fp4", double=False)])
def test_products_are_the_same_while_held_and_after(
    tiny_base: Path, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr("adapterhub.trainer.model.arithmetic_of", lambda _device: "float32")
    model = load_base(tiny_base, quantization, "cpu").eval()
    ids = torch.arange(3, 35)[None]
    with torch.inference_mode():
        before = model(ids).logits
        with weights_held(model) as held:
            during = model(ids).logits
        after = model(ids).logits
    assert held == 14  # seven linear layers in each of two
    assert torch.equal(during, before)
    assert torch.equal(after, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_does_not_fit_or_computes_otherwise_is_left_alone(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arithmetic, free, expected in (("bfloat16", 2**30, 0), ("float32", 0, 0), ("float32", 2**17, 4)):
        monkeypatch.setattr("adapterhub.trainer.model.arithmetic_of", lambda _device, a=arithmetic: a)
        monkeypatch.setattr("adapterhub.packaging.held._free_memory", lambda f=free: f)
        with weights_held(load_base(tiny_base, Quantization(), "cpu")) as held:
            assert held == expected, (arithmetic, free)
