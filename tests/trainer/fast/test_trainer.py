"""The fast path inside transformers' Trainer: accumulation, schedule, checkpoints, and a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from adapterhub.trainer.activations import Setting
from adapterhub.trainer.fast.install import FastPath, install_blocks
from adapterhub.trainer.recipe import Recipe

Make = Callable[..., Any]

SETTING = Setting(2, "adamw", "fast", recompute_mlp=1)
RECIPE = Recipe.from_dict(
    {
        "name": "r",
        "base": "b",
        "data": {"train": "t"},
        "training": {"learning_rate": 5e-3, "max_grad_norm": 0.3},
    },
    Path(),
)


def train(
    model: Any, rows: list[dict[str, torch.Tensor]], out: Path, *, fast: bool, resume: Path | None = None
) -> list[float]:
    """Six optimizer steps of two micro-batches of two rows; the losses that Trainer logs."""

    def collate(members: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch = {name: torch.stack([row[name] for row in members]) for name in members[0]}
        return FastPath.prepare(batch) if fast else batch

    arguments = TrainingArguments(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=5e-3, lr_scheduler_type="cosine", max_grad_norm=0.0 if fast else 0.3, save_steps=3,
        logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False, seed=1,
    )  # fmt: skip
    optimizers: tuple[Any, None] = (None, None)
    if fast:
        path = install_blocks(model.get_base_model(), SETTING, torch.float32, torch.device("cpu"))
        optimizers = (path.optimizer(RECIPE, SETTING), None)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, optimizers=optimizers)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def rows(packed_batch: Make) -> list[dict[str, torch.Tensor]]:
    batch = packed_batch(rows=24)
    return [{name: values[index] for name, values in batch.items()} for index in range(24)]


@pytest.mark.slow
def test_it_trains_as_peft_does_and_resumes_to_the_same_bytes(
    quantized_model: Make, rows: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    expected = train(quantized_model("llama"), rows, tmp_path / "plain", fast=False)
    losses = train(quantized_model("llama"), rows, tmp_path / "fast", fast=True)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-4, atol=2e-4)

    half = tmp_path / "fast" / "checkpoint-3"
    resumed = train(quantized_model("llama"), rows, tmp_path / "resumed", fast=True, resume=half)
    assert resumed == losses
    whole, again = (
        load_file(tmp_path / name / "checkpoint-6" / "adapter_model.safetensors")
        for name in ("fast", "resumed")
    )
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
