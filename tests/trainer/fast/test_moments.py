"""A run that was stopped under one engine's optimizer goes on under another's."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub.errors import TrainingError
from adapterhub.trainer.activations import Setting
from adapterhub.trainer.fast.install import install_blocks
from adapterhub.trainer.moments import portable, restore
from adapterhub.trainer.recipe import Recipe

Make = Callable[..., Any]
RECIPE = Recipe.from_dict(
    {
        "name": "r",
        "base": "b",
        "data": {"train": "t"},
        "training": {"learning_rate": 5e-3, "max_grad_norm": 1e9, "weight_decay": 0.01},
    },
    Path(),
)


class Stepping:
    """A model whose adapter is stepped with gradients drawn by the number of the step."""

    def __init__(self, model: Any, *, fast: bool, optimizer: str = "adamw") -> None:
        self.model = model
        self.trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.flat = None
        if fast:
            setting = Setting(2, optimizer, "fast")  # type: ignore[arg-type]
            path = install_blocks(model.get_base_model(), setting, torch.float32, torch.device("cpu"))
            self.flat = path.flat
            self.optimizer: Any = path.optimizer(RECIPE, setting)
        else:
            self.optimizer = torch.optim.AdamW(self.trained.values(), lr=5e-3, weight_decay=0.01)

    def steps(self, *numbers: int) -> None:
        for number in numbers:
            draw = torch.Generator().manual_seed(number)
            for parameter in self.trained.values():
                gradient = torch.randn(parameter.shape, generator=draw)
                if self.flat is None:
                    parameter.grad = gradient
                else:
                    self.flat.gradient_view(parameter).copy_(gradient)
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-3 * (number + 1)
            self.optimizer.step()

    def take_over(self, other: Stepping) -> None:
        """Weights and optimizer state of ``other``, by way of a file."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(other.trained[name])
        file = io.BytesIO()
        torch.save(portable(other.optimizer, other.model), file)
        file.seek(0)
        restore(self.optimizer, self.model, torch.load(file, weights_only=True), "optimizer.pt")


@pytest.mark.parametrize("fast_first", [True, False])
@pytest.mark.parametrize("fast_then", [True, False])
def test_what_one_engine_saved_another_goes_on_from(
    quantized_model: Make, fast_first: bool, fast_then: bool
) -> None:
    first = Stepping(quantized_model("llama"), fast=fast_first)
    first.steps(0, 1, 2)
    then = Stepping(quantized_model("llama"), fast=fast_then)
    then.take_over(first)
    assert then.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]
    first.steps(3, 4)
    then.steps(3, 4)
    for name, weights in first.trained.items():
        torch.testing.assert_close(then.trained[name], weights, rtol=1e-6, atol=1e-7)


def test_state_in_8_bits_is_only_read_by_what_wrote_it(quantized_model: Make) -> None:
    saved = {"kind": "FlatAdamW in 8 bits", "state": {"state": {}, "param_groups": []}}
    plain = Stepping(quantized_model("llama"), fast=False)
    with pytest.raises(TrainingError, match="another optimizer, FlatAdamW in 8 bits"):
        restore(plain.optimizer, plain.model, saved, "optimizer.pt")
    plain.steps(0)
    eight = Stepping(quantized_model("llama"), fast=True, optimizer="paged_adamw_8bit")
    with pytest.raises(TrainingError, match="another optimizer, in 32 bits"):
        restore(eight.optimizer, eight.model, portable(plain.optimizer, plain.model), "optimizer.pt")


@pytest.mark.parametrize("saved", [[], {}, {"state": {}, "param_groups": []}])
def test_what_is_no_state_is_named(quantized_model: Make, saved: Any) -> None:
    plain = Stepping(quantized_model("llama"), fast=False)
    with pytest.raises(TrainingError, match="is no optimizer state"):
        restore(plain.optimizer, plain.model, saved, "run/optimizer.pt")
