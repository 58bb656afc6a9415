"""The training loop: transformers.Trainer with our batches, our progress and our checks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from adapterhub.errors import TrainingError
from adapterhub.trainer.checkpoints import mark_complete
from adapterhub.trainer.packing import PackedRow, collate
from adapterhub.trainer.progress import TrainingProgress
from adapterhub.trainer.template import IGNORED

if TYPE_CHECKING:
    from peft import PeftModel


class AdapterTrainer(Trainer):
    """transformers.Trainer over packed rows."""

    def __init__(
        self,
        model: PeftModel,
        arguments: TrainingArguments,
        rows: Sequence[PackedRow],
        held_out: Sequence[PackedRow],
        pad_token_id: int,
        progress: TrainingProgress,
        eval_every: int,
    ) -> None:
        watcher = _Watcher(self, progress, held_out, pad_token_id, eval_every)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=lambda batch: collate(batch, pad_token_id),
            callbacks=[watcher],
        )
        self.tokens_seen = 0
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One micro-batch forward and backward; counts its tokens by shape, which costs no device sync."""
        self.tokens_seen += inputs["input_ids"].numel()
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss


class _Watcher(TrainerCallback):
    """Shows progress, measures held-out loss, stops at NaN, marks checkpoints, keeps the clock."""

    def __init__(
        self,
        trainer: AdapterTrainer,
        progress: TrainingProgress,
        held_out: Sequence[PackedRow],
        pad_token_id: int,
        eval_every: int,
    ) -> None:
        self._trainer = trainer
        self._progress = progress
        self._held_out = held_out
        self._pad_token_id = pad_token_id
        self._eval_every = eval_every
        self._seconds_before = 0.0
        self._tokens_before = 0
        self._evaluating = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for entry in state.log_history:  # what a resumed run had behind it
            self._seconds_before = entry.get("seconds", self._seconds_before)
            self._tokens_before = entry.get("tokens", self._tokens_before)
        self._began = time.monotonic()
        self._first_step = state.global_step
        if state.global_step == 0:
            self._measure_held_out(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_log = True
        if state.global_step % self._eval_every == 0 or state.global_step == state.max_steps:
            self._measure_held_out(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        norm = (logs or {}).get("grad_norm", 0.0)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}, the gradient norm {norm}",
                "lower training.learning_rate or raise training.warmup; --resume has the last checkpoint",
            )
        seconds = time.monotonic() - self._began - self._evaluating
        rate = self._trainer.tokens_seen / max(seconds, 1e-9)
        done_here = max(1, state.global_step - self._first_step)
        left = seconds / done_here * (state.max_steps - state.global_step)
        state.log_history[-1]["seconds"] = self._seconds_before + seconds
        state.log_history[-1]["tokens"] = self._tokens_before + self._trainer.tokens_seen
        self._progress.step(state.global_step, state.max_steps, loss, rate, left)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def _measure_held_out(self, state: TrainerState) -> None:
        if not self._held_out:
            return
        began = time.monotonic()
        model: Any = self._trainer.model
        loss = held_out_loss(
            model, self._held_out, self._pad_token_id, self._trainer.args.per_device_train_batch_size
        )
        self._evaluating += time.monotonic() - began
        state.log_history.append({"step": state.global_step, "eval_loss": loss})
        self._progress.held_out(state.global_step, loss)


def held_out_loss(
    model: torch.nn.Module, rows: Sequence[PackedRow], pad_token_id: int, micro_batch: int = 1
) -> float:
    """Mean loss over all labelled tokens of ``rows`` in nats a token, dropout off; restores the model's mode.

    Every token counts once whatever row it is in (a mean of batch means would weigh short batches more).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
        for at in range(0, len(rows), micro_batch):
            batch = {
                name: t.to(device) for name, t in collate(rows[at : at + micro_batch], pad_token_id).items()
            }
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False).logits  # (rows, longest, vocabulary)
            total += torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                labels[:, 1:].flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            count += int((labels[:, 1:] != IGNORED).sum())
    model.train(was_training)
    return float(total) / count
