"""From a recipe and its plan to transformers' own settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.plan import Plan
from adapterhub.trainer.recipe import Recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments


def training_arguments(
    recipe: Recipe, plan: Plan, hardware: Hardware, rows: int, run_folder: Path
) -> TrainingArguments:
    """Settings for a run over ``rows`` packed rows whose checkpoints go to ``run_folder``.

    Each step is logged. The held-out loss is measured by our own callback, four times a run by default.
    """
    from transformers import TrainingArguments

    settings = recipe.training
    steps = steps_of(recipe, rows)
    fast = plan.setting.engine != "plain"
    arguments = TrainingArguments(
        output_dir=str(run_folder),
        max_steps=steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0 if fast else settings.max_grad_norm,  # the fast path clips inside its optimizer
        optim=plan.optimizer,
        # The fast path has its own compute dtype; autocast would only get in its way.
        bf16=not fast and hardware.arithmetic == "bfloat16",
        use_cache=False,  # with a cache, transformers does not see that rows are packed: examples would mix
        use_cpu=hardware.device == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_every or quarter(steps),
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=hardware.device == "cuda",
        # Every adapter parameter is used in every step, but those on a vision tower while text is trained.
        ddp_find_unused_parameters=bool(plan.shape.tower),
        **_recomputation(plan),
    )
    # A process has one GPU; of several that it sees transformers would make a DataParallel, losses times two.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _recomputation(plan: Plan) -> dict[str, Any]:
    """transformers' own recomputation of every layer, where the plan has it."""
    if not plan.gradient_checkpointing:
        return {}
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}


def steps_of(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a run over ``rows`` packed rows."""
    a_pass = math.ceil(rows / recipe.training.batch_size)
    return recipe.training.steps or math.ceil((recipe.training.epochs or 1) * a_pass)


def quarter(steps: int) -> int:
    """How often held-out losses and checkpoints come by default, in steps."""
    return max(1, steps // 4)
