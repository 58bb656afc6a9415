"""From a recipe to a release: rows to tokens, base to 4 bits, the adapter trained, the folder sealed."""

from __future__ import annotations

import errno
import gc
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import DataError, TrainingError
from adapterhub.packaging.base import lock_base
from adapterhub.packaging.evidence import LedgerMiss
from adapterhub.packaging.manifest import DatasetLock, Hardware
from adapterhub.packaging.release import Release
from adapterhub.packaging.splits import Split
from adapterhub.trainer import ranks
from adapterhub.trainer.arguments import quarter, steps_of, training_arguments
from adapterhub.trainer.checkpoints import prepare_run, run_folder, run_lock, step_of
from adapterhub.trainer.data import Row, rows_digest
from adapterhub.trainer.examples import Examples, encode_rows
from adapterhub.trainer.memory import first_line, is_out_of_memory
from adapterhub.trainer.packing import PackedRow, pack
from adapterhub.trainer.plan import Plan, plan_with_less
from adapterhub.trainer.progress import TrainingProgress
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.sealing import Origin, measured_ledger, measured_peak, seal, training_curve

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from adapterhub.trainer.fast.install import FastPath, LinearsPath
    from adapterhub.trainer.fast.optimizer import FlatAdamW
    from adapterhub.trainer.loop import AdapterTrainer

Say = Callable[[str], None]
# What a run may go on with otherwise: it changes what fits, and not what is trained.
_HOW_IT_FITS = ("micro_batch", "gradient_checkpointing")
# What reading a damaged checkpoint raises, and running out of memory.
_BROKEN = (EOFError, FileNotFoundError, ValueError, RuntimeError, MemoryError, pickle.UnpicklingError)


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


@dataclass(frozen=True)
class _Run:
    """What stays the same however often a run has to be planned anew."""

    recipe: Recipe
    base: BaseSource
    tokenizer: PreTrainedTokenizerBase
    new_tokens: dict[int, list[int]]
    """Ids of new tokens, and what each was spelled with before."""
    rows: list[PackedRow]
    held_out: list[PackedRow]
    out: Path
    hardware: Hardware
    progress: TrainingProgress


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
    same bytes. A run that runs out of the device's memory all the same is planned again with less and goes on
    from its last step. In a run of several processes (``ranks.together``) each calls this with the plan for
    its share of the batch, and the first one writes. ``say`` receives what a person should know, a line each.

    Raises TrainingError (NaN loss, nothing fits, another run in the way), DataError (rows that do not fit the
    template or the context), ReleaseError (``out`` exists, unusable base).
    """
    from adapterhub.trainer.model import load_tokenizer
    from adapterhub.trainer.vocabulary import add_tokens

    tokenizer = load_tokenizer(base.folder)
    new_tokens = add_tokens(tokenizer, recipe.lora.new_tokens)
    data = _held_apart(data, say)
    encoded = {source.split: _encode(tokenizer, source, recipe.data.max_length, say) for source in data}
    datasets = tuple(_lock_data(recipe, source, encoded[source.split].rows) for source in data)
    lock = lock_base(
        base.folder,
        name=base.name,
        revision=base.revision,
        quantization=recipe.quantization,
        weights=base.weights,
        chat_template=tokenizer.chat_template,
    )
    identity = {
        "recipe": recipe.model_dump(mode="json", exclude={"training": set(_HOW_IT_FITS)}),
        "base": lock.digest,
        "data": [dataset.sha256 for dataset in datasets],
    }
    seed, length, packing = recipe.training.seed, recipe.data.max_length, recipe.data.packing
    rows = pack(encoded["train"].encoded, length, seed=seed, packing=packing)
    held_out = pack(encoded["test"].encoded, length, seed=seed, packing=packing) if "test" in encoded else []
    say(f"{len(encoded['train'].rows)} examples in {len(rows)} rows of at most {length} tokens")
    run = _Run(recipe, base, tokenizer, new_tokens, rows, held_out, out, hardware, progress)
    with run_lock(out) if ranks.is_first() else nullcontext(), _no_space_in_words():
        checkpoint = ranks.first_decides(lambda: prepare_run(out, identity, resume=resume))
        if checkpoint:
            say(f"resuming from {checkpoint.name}")
        trainer, final_plan, misses = _train_until_it_fits(run, plan, checkpoint, say)
        ledger = measured_ledger(final_plan, hardware, misses)
        curve = training_curve(trainer.state.log_history, trainer.state.global_step, hardware)
        origin = Origin(recipe, lock, datasets, hardware)
        model, state = trainer.finish(), trainer.whole_adapter()
        if ranks.is_first():
            seal(out, origin, model, tokenizer, ledger, curve, state)
        ranks.wait_for_all()
        return Release.open(out)


def _held_apart(data: Sequence[DataSource], say: Say) -> list[DataSource]:
    """The sources without held-out rows that are trained on as well; those are counted and said.

    Raises DataError when no held-out row is left.
    """
    trained_on = {rows_digest([row]) for source in data if source.split == "train" for row in source.rows}
    apart = []
    for source in data:
        kept = source.rows
        if source.split == "test":
            kept = [row for row in source.rows if rows_digest([row]) not in trained_on]
        if not kept:
            raise DataError(
                f"all {len(source.rows)} test rows of {source.name} are training rows too",
                "name held-out rows as data.test, or leave it out",
            )
        if len(kept) < len(source.rows):
            say(f"left out {len(source.rows) - len(kept)} test rows that are training rows too")
        apart.append(replace(source, rows=kept))
    return apart


def _encode(tokenizer: PreTrainedTokenizerBase, source: DataSource, max_length: int, say: Say) -> Examples:
    """Rows to tokens; those that are left out for their length are counted and said."""
    examples = encode_rows(tokenizer, source.rows, max_length, source.split)
    if examples.too_long:
        where, length = max(examples.too_long, key=lambda found: found[1])
        say(
            f"left out {len(examples.too_long)} of {len(source.rows)} {source.split} rows longer than "
            f"data.max_length {max_length}; the longest is {length} tokens ({where})"
        )
    return examples


def _lock_data(recipe: Recipe, source: DataSource, kept: list[Row]) -> DatasetLock:
    return DatasetLock(
        source=source.name,
        revision=source.revision,
        split=source.split,
        rows=len(kept),
        sha256=rows_digest(kept),
        licence=recipe.data.licence,
    )


@dataclass(frozen=True)
class _OutOfMemory:
    """How an attempt ended. Not the exception: its traceback would keep the base in memory."""

    step: int
    """Optimizer steps that were done."""
    where: str
    """In words, like ``in step 5``."""
    message: str
    measured_peak_bytes: int
    checkpoint: Path | None
    """What the next attempt goes on from."""


def _train_until_it_fits(
    run: _Run, first: Plan, checkpoint: Path | None, say: Say
) -> tuple[AdapterTrainer, Plan, list[LedgerMiss]]:
    """Train to the end; after an out-of-memory go on from the last step with a plan that needs less."""
    current = first
    misses: list[LedgerMiss] = []
    while True:
        ended = _attempt(run, current, checkpoint)
        if not isinstance(ended, _OutOfMemory):
            return ended, current, misses
        misses.append(_miss(current, ended))
        checkpoint = ended.checkpoint
        _let_go(run.hardware)
        current = plan_with_less(current, run.recipe)
        say(
            f"out of memory {ended.where}, though {misses[-1].predicted_peak_bytes / 2**30:.1f} GiB were "
            f"predicted; going on with micro-batches of {current.micro_batch} and "
            f"{current.setting.recompute_all} layers recomputed"
        )


def _attempt(run: _Run, current: Plan, checkpoint: Path | None) -> AdapterTrainer | _OutOfMemory:
    """Train with one plan: the trainer at its end, or what an out-of-memory left."""
    trainer: AdapterTrainer | None = None
    try:
        trainer = _build(run, current, checkpoint)
        _check_disk(run.out, trainer.peft_model)
        with run.progress:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer
    except _BROKEN as err:
        began = trainer is not None and trainer.began
        if not is_out_of_memory(err):
            if checkpoint is None or trainer is None or began:
                raise
            raise TrainingError(
                f"{checkpoint} cannot be resumed: {type(err).__name__}",
                "remove that folder: --resume then takes the checkpoint before it, or begins anew",
            ) from err
        step = trainer.state.global_step if trainer is not None and began else step_of(checkpoint)
        message, measured = first_line(err), measured_peak(run.hardware)[0]
        where = f"in step {step + 1}" if began else "while the run was set up"
        if ranks.world_size() > 1:  # the others wait inside this step
            raise TrainingError(
                f"process {ranks.rank()} is out of memory {where}",
                f"set training.micro_batch below {current.micro_batch} and go on with --resume",
            ) from err
    # The exception is gone, and with its traceback what the failed step held: saving takes memory too.
    _let_go(run.hardware)
    kept = _keep_step(trainer) if trainer is not None and began else None
    return _OutOfMemory(step, where, message, measured, kept or checkpoint)


def _keep_step(trainer: AdapterTrainer) -> Path | None:
    """A checkpoint of the last step, or None where there is no memory even for that."""
    try:
        return trainer.keep_step()
    except _BROKEN as err:
        if not is_out_of_memory(err):
            raise
        return None


def _let_go(hardware: Hardware) -> None:
    """Free what the last attempt held, before the next one loads its base; measure that one by itself."""
    import torch

    gc.collect()
    if hardware.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _build(run: _Run, current: Plan, checkpoint: Path | None) -> AdapterTrainer:
    """Base, adapter and trainer for one plan; what FSDP divides has the weights of ``checkpoint`` before."""
    import torch

    from adapterhub.trainer.loop import AdapterTrainer

    recipe = run.recipe
    model = _model(run, current)
    if current.setting.shards > 1:
        from adapterhub.trainer.sharding import shard

        if checkpoint is not None:
            model.load_adapter(str(checkpoint), "default", is_trainable=True)
        shard(model)
    torch.manual_seed(recipe.training.seed)
    return AdapterTrainer(
        model,
        training_arguments(recipe, current, run.hardware, len(run.rows), run_folder(run.out)),
        run.rows,
        run.held_out,
        run.tokenizer.pad_token_id,
        run.progress,
        recipe.training.eval_every or quarter(steps_of(recipe, len(run.rows))),
        fast_path=_fast_path(model, recipe, current),
        sharded=current.setting.shards > 1,
    )


def _model(run: _Run, current: Plan) -> PeftModel:
    """The base with its adapter, at the start of a run."""
    from adapterhub.trainer.initial import keep_start, start_from_quantization_error
    from adapterhub.trainer.model import attach_adapter, load_base
    from adapterhub.trainer.vocabulary import grow_vocabulary, start_rows

    recipe, tokens = run.recipe, run.new_tokens
    sharded = current.setting.shards > 1
    base = load_base(run.base.folder, recipe.quantization, run.hardware.device, divisible=sharded)
    if tokens:
        grow_vocabulary(base, max(tokens) + 1)
        start_rows(base, tokens)
    model = attach_adapter(base, recipe.lora, seed=recipe.training.seed, token_ids=list(tokens))
    if recipe.lora.init == "loftq":
        start_from_quantization_error(model, run.base.folder)
    elif recipe.lora.init == "pissa":
        keep_start(model, run_folder(run.out))
    return model


def _fast_path(
    model: PeftModel, recipe: Recipe, current: Plan
) -> tuple[FastPath | LinearsPath, FlatAdamW] | None:
    """The fast path and its optimizer where the plan wants them, else None."""
    if current.setting.engine == "plain":
        return None
    from adapterhub.trainer.fast.install import install_fast_path

    fast = install_fast_path(model, recipe, current)
    return fast, fast.optimizer(recipe, current.setting)


def _miss(current: Plan, ended: _OutOfMemory) -> LedgerMiss:
    return LedgerMiss(
        step=ended.step,
        predicted_peak_bytes=current.predicted_peak_bytes,
        measured_peak_bytes=ended.measured_peak_bytes,
        micro_batch=current.micro_batch,
        layers_recomputed=current.setting.recompute_all,
        message=ended.message,
    )


@contextmanager
def _no_space_in_words() -> Iterator[None]:
    """Turn no-space, raised deep in torch or safetensors, into an error that can be acted on."""
    try:
        yield
    except (RuntimeError, OSError) as err:
        text = str(err)
        if "No space left" in text or "os error 28" in text or getattr(err, "errno", None) == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, "no space left on the disk for a checkpoint; --resume goes on"
            ) from err
        raise


def _check_disk(out: Path, model: PeftModel) -> None:
    """Raise OSError (ENOSPC) before the first step when three checkpoints and the release do not fit."""
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = 3 * 3 * trainable + trainable + 64 * 2**20  # a checkpoint: weights and two Adam moments
    free = shutil.disk_usage(run_folder(out)).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"checkpoints and release need about {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free",
            str(out.parent),
        )
