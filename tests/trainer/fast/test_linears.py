"""Our products inside transformers' own layers: loss, gradients and steps are those of peft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import CLOSE, assert_equal_gradients, fast_gradients, plain_gradients, trained

from adapterhub.errors import TrainingError
from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.activations import Setting
from adapterhub.trainer.fast.install import LinearsPath, install_fast_path, install_linears
from adapterhub.trainer.ledger import ledger
from adapterhub.trainer.plan import Plan
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import shape_of

Make = Callable[..., Any]

SETTING = Setting(2, "adamw", "linears")
RECIPE = Recipe.from_dict(
    {
        "name": "r",
        "base": "b",
        "data": {"train": "t"},
        "training": {"learning_rate": 2e-3, "weight_decay": 0.01, "max_grad_norm": 0.3},
    },
    Path(),
)


def install(model: Any, dtype: torch.dtype = torch.float32) -> LinearsPath:
    return install_linears(model.get_base_model(), SETTING, dtype, torch.device("cpu"))


def test_loss_and_gradients_are_those_of_peft(
    quantized_model: Make, packed_batch: Make, foreign_architecture: str
) -> None:
    model, inputs = quantized_model(foreign_architecture), packed_batch()
    loss, expected = plain_gradients(model, inputs)
    our_loss, gradients = fast_gradients(model, install(model), inputs)
    torch.testing.assert_close(our_loss, loss, **CLOSE)
    assert_equal_gradients(gradients, expected)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]])
def test_any_choice_of_modules_may_be_adapted(
    quantized_model: Make, packed_batch: Make, targets: list[str]
) -> None:
    model, inputs = quantized_model("gemma2", targets=targets, rank=3), packed_batch()
    _, expected = plain_gradients(model, inputs)
    _, gradients = fast_gradients(model, install(model), inputs)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_gradient(quantized_model: Make, packed_batch: Make, dropout: float) -> None:
    """By transformers' own checkpointing; a layer's dropout is drawn again as it was."""
    results = []
    for recompute in (False, True):
        model = quantized_model("gemma3_text", dropout=dropout)
        path = install(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        results.append(fast_gradients(model, path, packed_batch()))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[1][1].items():
        assert torch.equal(gradient, results[0][1][name]), name


@pytest.mark.slow
def test_ten_steps_train_as_peft_with_torchs_adamw(
    quantized_model: Make, packed_batch: Make, foreign_architecture: str
) -> None:
    batches = [packed_batch(seed=seed % 5) for seed in range(10)]
    plain = quantized_model(foreign_architecture)
    adamw = torch.optim.AdamW(trained(plain).values(), lr=2e-3, weight_decay=0.01)
    expected = []
    for inputs in batches:
        loss, _ = plain_gradients(plain, inputs)
        torch.nn.utils.clip_grad_norm_(trained(plain).values(), 0.3)
        adamw.step()
        adamw.zero_grad()
        expected.append(loss)
    model = quantized_model(foreign_architecture)
    path = install(model)
    optimizer = path.optimizer(RECIPE, SETTING)
    losses = []
    for inputs in batches:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), **CLOSE)


def test_without_it_the_model_is_pefts_again(quantized_model: Make, packed_batch: Make) -> None:
    model, inputs = quantized_model("gemma2"), packed_batch()
    expected, _ = plain_gradients(model, inputs)
    path = install(model)
    with torch.no_grad(), model.disable_adapter():
        without = model(**inputs).loss
    assert float(without) != pytest.approx(float(expected), rel=1e-3)
    assert model(input_ids=inputs["input_ids"]).logits.shape == (2, 24, 300)
    path.remove()
    for parameter in trained(model).values():
        parameter.grad = None
    loss, gradients = plain_gradients(model, inputs)
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert all(gradient is not None for gradient in gradients.values())


@pytest.mark.parametrize(
    "targets",
    ["all-linear", pytest.param(["q_proj", "k_proj", "v_proj", "up_proj"], marks=pytest.mark.slow)],
    ids=["all", "some"],
)
def test_the_ledger_counts_what_autograd_saves(
    quantized_model: Make, foreign_architecture: str, targets: str | list[str]
) -> None:
    """In bf16, by every tensor that is handed to autograd in one pass over a row of 256 tokens."""
    model = quantized_model(foreign_architecture, dtype=torch.bfloat16, targets=targets)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    path = install(model, torch.bfloat16)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, 300, (1, 256))
    positions = torch.cat([torch.arange(128)] * 2)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**path.prepare({"input_ids": ids, "labels": ids, "position_ids": positions})).loss.backward()
    shape = shape_of(model.get_base_model().config.to_dict())
    wanted = Recipe.from_dict(
        {
            "name": "r",
            "base": "b",
            "data": {"train": "t", "max_length": 256},
            "lora": {"rank": 4, "target_modules": targets},
        },
        Path(),
    )
    card = Hardware(device="cuda", name="a GPU", memory_bytes=2**34)
    found = ledger(shape, wanted, card, replace(SETTING, micro_batch=1))
    (saved,) = [part.bytes for part in found.parts if part.name == "saved activations"]
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(saved, rel=0.05)


def test_what_it_cannot_train_is_refused_in_words(quantized_model: Make) -> None:
    model = quantized_model("gemma2", targets=["q_proj", "lm_head"])
    shape = shape_of(model.get_base_model().config.to_dict())
    card = Hardware(device="cuda", name="a GPU", memory_bytes=2**34)
    made = Plan(shape, card, SETTING, ledger(shape, RECIPE, card, SETTING), 2, 0, ())
    with pytest.raises(TrainingError, match="lm_head is not a 4-bit linear"):
        install_fast_path(model, RECIPE, made)
