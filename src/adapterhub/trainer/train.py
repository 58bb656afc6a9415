"""From a recipe to a release: rows to tokens, base to 4 bits, adapter trained, evidence and folder sealed."""

from __future__ import annotations

import math
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import DataError, TrainingError
from adapterhub.packaging import evidence
from adapterhub.packaging.base import lock_base
from adapterhub.packaging.manifest import BaseLock, DatasetLock, Hardware, Manifest
from adapterhub.packaging.release import Release, new_release
from adapterhub.trainer.checkpoints import prepare_run, run_folder
from adapterhub.trainer.data import Row, Split, rows_digest
from adapterhub.trainer.packing import PackedRow, pack
from adapterhub.trainer.progress import TrainingProgress
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.template import Encoded, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from adapterhub.trainer.plan import Plan

Say = Callable[[str], None]
_TOOLS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors")


@dataclass(frozen=True)
class BaseSource:
    """A base model on this disk, and where it came from."""

    folder: Path
    name: str
    """``owner/name``, or the folder's name."""
    revision: str | None = None
    """Hub commit, 40 hex digits."""
    weights: dict[str, str] | None = None
    """sha256 by weight file when the Hub's listing gave it; None: hashed here."""


@dataclass(frozen=True)
class DataSource:
    """Rows read from somewhere."""

    rows: list[Row]
    name: str
    """A file's name, or ``owner/name``."""
    split: Split
    revision: str | None = None
    """Hub commit, 40 hex digits."""


def train(
    recipe: Recipe,
    base: BaseSource,
    data: Sequence[DataSource],
    out: Path,
    *,
    plan: Plan,
    hardware: Hardware,
    progress: TrainingProgress,
    resume: bool = False,
    say: Say = lambda line: None,
) -> Release:
    """Train the adapter that ``recipe`` describes and seal it as a release at ``out``.

    ``data`` holds the training rows and, if any, the held-out rows. Checkpoints lie in ``<out>.run`` until
    the release is sealed; a killed run goes on from the last with ``resume`` and, on the CPU, ends with the
    same bytes. ``say`` receives what a person should know, a line each.

    Raises TrainingError (NaN loss, out of memory, another run in the way), DataError (rows that do not fit
    the template or the context), ReleaseError (``out`` exists, unusable base).
    """
    from adapterhub.trainer.model import attach_adapter, load_base, load_tokenizer

    tokenizer = load_tokenizer(base.folder)
    encoded = {source.split: _encode(tokenizer, source, recipe.data.max_length, say) for source in data}
    lock = lock_base(
        base.folder,
        name=base.name,
        revision=base.revision,
        quantization=recipe.quantization,
        weights=base.weights,
        chat_template=tokenizer.chat_template,
    )
    datasets = tuple(
        _lock_data(recipe, source, kept) for source in data for kept in [encoded[source.split][0]]
    )
    identity = {
        "recipe": recipe.model_dump(mode="json"),
        "base": lock.digest,
        "data": [dataset.sha256 for dataset in datasets],
        "micro_batch": plan.micro_batch,
    }
    checkpoint = prepare_run(out, identity, resume=resume)
    if checkpoint:
        say(f"resuming from {checkpoint.name}")

    seed, length, packing = recipe.training.seed, recipe.data.max_length, recipe.data.packing
    rows = pack(encoded["train"][1], length, seed=seed, packing=packing)
    held_out = pack(encoded["test"][1], length, seed=seed, packing=packing) if "test" in encoded else []
    say(f"{len(encoded['train'][1])} examples in {len(rows)} rows of at most {length} tokens")
    with _out_of_memory_in_words():
        model = load_base(base.folder, recipe.quantization, hardware.device)
        peft_model = attach_adapter(model, recipe.lora, seed=seed)
        trainer = _trainer(recipe, plan, peft_model, rows, held_out, tokenizer, out, hardware, progress)
        _check_disk(out, peft_model)
        with progress:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    ledger = _measured_ledger(plan, hardware)
    curve = _curve(trainer.state.log_history, trainer.state.global_step, hardware)
    return _seal(out, recipe, lock, datasets, hardware, peft_model, tokenizer, ledger, curve)


def _encode(
    tokenizer: PreTrainedTokenizerBase, source: DataSource, max_length: int, say: Say
) -> tuple[list[Row], list[Encoded]]:
    """Rows to tokens; those longer than ``max_length`` are left out, counted and said."""
    rows, examples, too_long = [], [], []
    for row in source.rows:
        try:
            example = encode(tokenizer, row.messages)
        except DataError as err:
            raise DataError(f"{row.where}: {err.what}", err.fix) from err
        if len(example.input_ids) > max_length:
            too_long.append((row.where, len(example.input_ids)))
        else:
            rows.append(row)
            examples.append(example)
    if too_long:
        where, length = max(too_long, key=lambda found: found[1])
        say(
            f"left out {len(too_long)} of {len(source.rows)} {source.split} rows longer than data.max_length "
            f"{max_length}; the longest is {length} tokens ({where})"
        )
    if not examples:
        raise DataError(
            f"all {len(source.rows)} {source.split} rows are longer than data.max_length {max_length}",
            "raise data.max_length, or shorten the rows",
        )
    return rows, examples


def _lock_data(recipe: Recipe, source: DataSource, kept: list[Row]) -> DatasetLock:
    return DatasetLock(
        source=source.name,
        revision=source.revision,
        split=source.split,
        rows=len(kept),
        sha256=rows_digest(kept),
        licence=recipe.data.licence,
    )


def _trainer(
    recipe: Recipe,
    plan: Plan,
    model: PeftModel,
    rows: list[PackedRow],
    held_out: list[PackedRow],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    hardware: Hardware,
    progress: TrainingProgress,
) -> Any:
    import torch
    from transformers import TrainingArguments

    from adapterhub.trainer.loop import AdapterTrainer

    settings = recipe.training
    torch.manual_seed(settings.seed)
    steps_per_epoch = math.ceil(len(rows) / settings.batch_size)
    steps = settings.steps or math.ceil((settings.epochs or 1) * steps_per_epoch)
    quarter = max(1, steps // 4)
    arguments = TrainingArguments(
        output_dir=str(run_folder(out)),
        max_steps=steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=settings.batch_size // plan.micro_batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=plan.optimizer,
        activation_checkpointing=plan.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=True,
        use_cache=False,  # with a cache, transformers does not see that rows are packed: examples would mix
        use_cpu=hardware.device == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_every or quarter,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=hardware.device == "cuda",
    )
    pad = tokenizer.pad_token_id
    return AdapterTrainer(model, arguments, rows, held_out, pad, progress, settings.eval_every or quarter)


@contextmanager
def _out_of_memory_in_words() -> Iterator[None]:
    """Turn out-of-memory and no-space, raised deep in torch, into errors that can be acted on."""
    import errno

    import torch

    try:
        yield
    except torch.OutOfMemoryError as err:
        raise TrainingError(
            f"out of memory: {str(err).splitlines()[0][:200]}",
            "halve training.micro_batch or data.max_length (see `adapterhub plan`); then go on with --resume",
        ) from err
    except (RuntimeError, OSError) as err:
        text = str(err)
        if "No space left" in text or "os error 28" in text or getattr(err, "errno", None) == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, "no space left on the disk for a checkpoint; --resume goes on"
            ) from err
        raise


def _check_disk(out: Path, model: PeftModel) -> None:
    """Raise OSError (ENOSPC) before the first step when three checkpoints and the release do not fit."""
    import errno

    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = 3 * 3 * trainable + trainable + 64 * 2**20  # a checkpoint: weights and two Adam moments
    free = shutil.disk_usage(run_folder(out)).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"checkpoints and release need about {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free",
            str(out.parent),
        )


def _measured_ledger(plan: Plan, hardware: Hardware) -> evidence.LedgerEvidence:
    if hardware.device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        measured = torch.cuda.max_memory_reserved() + max(0, context)
        how = "torch's peak reserved bytes plus the CUDA context"
    else:
        scale = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        how = "peak resident set of the training process"
    return evidence.LedgerEvidence(
        device=hardware.device,
        parts=plan.ledger.parts,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=measured,
        measured_as=how,
    )


def _curve(history: Sequence[dict[str, Any]], steps: int, hardware: Hardware) -> evidence.CurveEvidence:
    points: dict[int, dict[str, Any]] = {}
    for entry in history:
        point = points.setdefault(int(entry["step"]), {})
        point.update(
            {key: entry[key] for key in ("loss", "eval_loss", "learning_rate", "grad_norm") if key in entry}
        )
    clock = [entry for entry in history if "seconds" in entry][-1]
    return evidence.CurveEvidence(
        points=tuple(
            evidence.CurvePoint(step=step, **point) for step, point in sorted(points.items()) if point
        ),
        steps=steps,
        train_tokens=clock["tokens"],
        seconds=round(clock["seconds"], 3),
        tokens_per_second=round(clock["tokens"] / clock["seconds"], 1),
        hardware=hardware,
    )


def _seal(
    out: Path,
    recipe: Recipe,
    lock: BaseLock,
    datasets: tuple[DatasetLock, ...],
    hardware: Hardware,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    ledger: evidence.LedgerEvidence,
    curve: evidence.CurveEvidence,
) -> Release:
    """Write the release, then remove the run folder."""
    from adapterhub.version import __version__

    draft = Manifest(
        name=recipe.name,
        version=recipe.version,
        created=datetime.now(UTC).replace(microsecond=0),
        kind="adapter",
        task=recipe.task,
        licence=recipe.licence,
        base=lock,
        recipe=recipe.public_dict(),
        datasets=datasets,
        tools={"adapterhub": __version__, "python": sys.version.split()[0]}
        | {name: installed_version(name) for name in _TOOLS},
        hardware=hardware,
    )
    config = model.peft_config["default"]
    config.base_model_name_or_path = lock.name
    config.revision = lock.revision
    config.target_modules = sorted(config.target_modules)  # a set's order would differ from run to run
    with new_release(out, draft) as staging:
        model.save_pretrained(staging, save_embedding_layers=False)  # "auto" would ask the Hub for the base
        (staging / "README.md").unlink(
            missing_ok=True
        )  # peft's own card; `adapterhub card` writes the real one
        tokenizer.save_pretrained(staging)
        (staging / "evidence").mkdir()
        (staging / evidence.LEDGER).write_bytes(evidence.to_json(ledger))
        (staging / evidence.CURVE).write_bytes(evidence.to_json(curve))
    shutil.rmtree(run_folder(out))
    return Release.open(out)
