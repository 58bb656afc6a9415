"""The training loop: transformers.Trainer with our batches, our progress and our checks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from adapterhub.errors import TrainingError
from adapterhub.trainer import ranks
from adapterhub.trainer.batches import BLANK, StepBatches, StepLoader
from adapterhub.trainer.checkpoints import is_complete, mark_complete
from adapterhub.trainer.moments import portable, restore
from adapterhub.trainer.packing import PackedRow, collate
from adapterhub.trainer.progress import TrainingProgress
from adapterhub.trainer.sharding import adapter_state, gathered
from adapterhub.trainer.template import IGNORED

if TYPE_CHECKING:
    from peft import PeftModel

    from adapterhub.trainer.fast.install import FastPath, LinearsPath
    from adapterhub.trainer.fast.optimizer import FlatAdamW


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
        fast_path: tuple[FastPath | LinearsPath, FlatAdamW] | None = None,
        sharded: bool = False,
    ) -> None:
        self.fast: FastPath | LinearsPath | None = None
        optimizer: FlatAdamW | None = None
        if fast_path is not None:
            self.fast, optimizer = fast_path
        self.peft_model = model
        self._pad_token_id = pad_token_id
        self._rows = rows
        self._sharded = sharded
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=self.collate_rows,
            callbacks=[_Watcher(self, progress, held_out, eval_every)],
            optimizers=(optimizer, None),
        )
        if self.fast is not None or sharded:
            self.accelerator.device_placement = False  # as _move_model_to_device
        if sharded:  # fully_shard divides the gradients' work; accelerate would put DDP around it
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)
        self.tokens_seen = 0
        self.began = False
        """Whether the loop was entered: everything that a resumed run needs was read."""
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def collate_rows(self, rows: Sequence[PackedRow]) -> dict[str, Any]:
        """Rows to what the model's forward takes, on the CPU."""
        batch = collate(rows, self._pad_token_id)
        return batch if self.fast is None else self.fast.prepare(batch)

    def get_train_dataloader(self) -> StepLoader:
        """This process's micro-batches, on the CPU; see ``StepBatches``."""
        micro, processes = self.args.per_device_train_batch_size, ranks.world_size()
        batches = StepBatches(
            len(self._rows),
            micro * self.args.gradient_accumulation_steps * processes,
            micro,
            seed=self.args.seed,
            process=ranks.rank(),
            processes=processes,
        )
        return StepLoader(
            self._rows, batches, self.collate_rows, pin_memory=bool(self.args.dataloader_pin_memory)
        )

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Leave the fast path's model where it is: on its device, paged adapter weights on the host. And one
        that FSDP divided.
        """
        if self.fast is None and not self._sharded:
            super()._move_model_to_device(model, device)

    def finish(self) -> PeftModel:
        """The trained model with its adapter as plain peft modules, ready to be saved."""
        if self.fast is not None:
            self.fast.remove()
        return self.peft_model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone: peft would add whole embeddings that were resized for new tokens.

        Every process comes here, and what FSDP divides all of them give; some versions of transformers would
        ask the first alone, who would wait for ever.
        """
        state = self.whole_adapter()
        if ranks.is_first():
            folder = Path(output_dir or str(self.args.output_dir))
            self.peft_model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)

    def whole_adapter(self) -> dict[str, torch.Tensor] | None:
        """The adapter's weights by name where FSDP divides them, else None; every process must ask."""
        return adapter_state(self.peft_model) if self._sharded else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing where FSDP divides the adapter: it was loaded whole before."""
        if not self._sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """In the form that every engine reads, whole where FSDP divides it; every process must come here."""
        scheduler: Any = self.lr_scheduler
        state = gathered(portable(self.unwrapped_optimizer(), self.peft_model))
        if ranks.is_first():
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        scheduler: Any = self.lr_scheduler
        file = Path(checkpoint) / OPTIMIZER_NAME
        saved = torch.load(file, map_location="cpu", weights_only=True)
        restore(self.unwrapped_optimizer(), self.peft_model, saved, str(file))
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        for name in ("base_lrs", "_last_lr", "lr_lambdas"):  # all groups have one; engines differ in how many
            schedule[name] = schedule[name][:1] * len(self.unwrapped_optimizer().param_groups)
        scheduler.load_state_dict(schedule)

    def unwrapped_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, not accelerate's wrapper of it."""
        optimizer: Any = self.optimizer
        found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return found

    def keep_step(self) -> Path | None:
        """Save a checkpoint of the last finished step, if there is one, for a run that cannot go on so."""
        if self.state.global_step == 0:
            return None
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if not is_complete(folder):
            self._save_checkpoint(self.peft_model, trial=None)
            mark_complete(folder)
        return folder

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
        eval_every: int,
    ) -> None:
        self._trainer = trainer
        self._progress = progress
        self._held_out = held_out
        self._eval_every = eval_every
        self._seconds_before = 0.0
        self._tokens_before = 0.0
        self._evaluating = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for entry in state.log_history:  # what a resumed run had behind it
            self._seconds_before = entry.get("seconds", self._seconds_before)
            self._tokens_before = entry.get("tokens", self._tokens_before)
        self._trainer.began = True
        if ranks.world_size() > 1:  # else all would drop the same of their different rows
            torch.manual_seed(args.seed + ranks.rank())
        self._began = time.monotonic()
        self._first_step = state.global_step
        self._measure_held_out(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_log = True

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
        norm = self._gradient_norm(logs or {})
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}, the gradient norm {norm}",
                "lower training.learning_rate or raise training.warmup, and remove "
                f"{self._trainer.args.output_dir} to begin again",
            )
        seconds = time.monotonic() - self._began - self._evaluating
        (tokens,) = ranks.total(self._trainer.tokens_seen)
        rate = tokens / max(seconds, 1e-9)
        done_here = max(1, state.global_step - self._first_step)
        left = seconds / done_here * (state.max_steps - state.global_step)
        state.log_history[-1]["grad_norm"] = norm
        state.log_history[-1]["seconds"] = self._seconds_before + seconds
        state.log_history[-1]["tokens"] = self._tokens_before + tokens
        self._progress.step(state.global_step, state.max_steps, loss, rate, left)
        self._measure_held_out(state)  # last: should it run out of memory, the step is told and kept

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        ranks.wait_for_all()  # each writes the state of its random numbers
        if ranks.is_first():
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def _gradient_norm(self, logs: dict[str, float]) -> float:
        """Before clipping: from transformers' log, or from the fast path's optimizer, which clips itself."""
        if self._trainer.fast is None:
            return logs.get("grad_norm", 0.0)
        optimizer: Any = self._trainer.unwrapped_optimizer()
        return float(optimizer.grad_norm)

    def _measure_held_out(self, state: TrainerState) -> None:
        """Where it is due, and was not measured at this step before the run was resumed from it."""
        step = state.global_step
        due = step % self._eval_every == 0 or step == state.max_steps
        measured = any("eval_loss" in entry and entry["step"] == step for entry in state.log_history)
        if not self._held_out or not due or measured:
            return
        began = time.monotonic()
        loss = held_out_loss(self._trainer, self._held_out)
        self._evaluating += time.monotonic() - began
        state.log_history.append({"step": state.global_step, "eval_loss": loss})
        self._progress.held_out(state.global_step, loss)


def held_out_loss(trainer: AdapterTrainer, rows: Sequence[PackedRow]) -> float:
    """Mean loss over all labelled tokens of ``rows`` in nats a token, dropout off; restores the model's mode.

    Every token counts once whatever row it is in (a mean of batch means would weigh short batches more). The
    processes of a run share the batches, and each computes equally many.
    """
    model: Any = trainer.model
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    size = trainer.args.per_device_train_batch_size
    plain = trainer.fast is None
    every = ranks.world_size() * size
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=trainer.args.bf16):
        for start in range(0, len(rows), every):
            at = start + ranks.rank() * size
            batch = trainer.collate_rows(rows[at : at + size] or [BLANK])
            count += int((batch["labels"][:, 1:] != IGNORED).sum())
            batch = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in batch.items()}
            total += _summed_loss(model, batch, chunked=not plain)
    model.train(was_training)
    summed, counted = ranks.total(float(total), count)
    return summed / counted


def _summed_loss(model: Any, batch: dict[str, Any], *, chunked: bool) -> torch.Tensor:
    """The sum of the losses of a batch's labelled tokens in nats, ()."""
    if chunked:  # the fast path never holds all logits
        loss: torch.Tensor = model(**batch, num_items_in_batch=1).loss
        return loss
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits  # (rows, longest, vocabulary)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
