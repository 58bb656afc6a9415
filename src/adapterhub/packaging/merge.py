"""Merging an adapter into its base: W + s·B·A, streamed from safetensors to safetensors.

Arithmetic is in float32 and rounded once, to bfloat16 or to a quantized weight's codes. ``onto="original"``
adds to the base's own weights; ``onto="trained"`` adds to what 4-bit quantization makes of them, which is
what the optimizer saw in QLoRA (https://arxiv.org/abs/2305.14314), and so replaces every quantized weight,
adapted or not.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import read_adapter
from adapterhub.packaging.base import check_base, check_config, weight_files
from adapterhub.packaging.checkpoint import Checkpoint, open_checkpoint
from adapterhub.packaging.companions import write_companions
from adapterhub.packaging.files import sha256_file, staged_folder
from adapterhub.packaging.layout import Storage, Stored
from adapterhub.packaging.manifest import MANIFEST_NAME, BaseLock, FileEntry, Merge, Parent, Quantization
from adapterhub.packaging.release import Release, new_release
from adapterhub.packaging.shards import Progress, Rewrite, rewrite_files
from adapterhub.packaging.sums import SumPlan, plan_sums
from adapterhub.packaging.tensors import TensorFile, encode_header
from adapterhub.version import __version__

Onto = Literal["original", "trained"]

_SPARE_BYTES = 64 * 1024 * 1024
_SUFFIXES: dict[Storage, str] = {"bf16": "-merged", "nf4": "-nf4", "fp4": "-fp4", "int8": "-int8"}
_MAX_NAME = 96


@dataclass(frozen=True)
class MergeReport:
    """What a merge made."""

    out: Path
    onto: Onto
    storage: Storage
    quantization: Quantization | None
    """What the base's linear layers went through; None when they kept their own weights."""
    tensors: int
    """All tensors of the base."""
    merged: int
    """Those that an adapter changed."""
    requantized: int
    """Those that went through 4 bits."""
    quantized: int
    """Those that are stored quantized."""
    size: int
    """Bytes of the new tensors."""
    seconds: float
    release: Release | None
    """None for a plain PEFT folder."""


def merge_adapter(
    adapter: Path,
    base: Path,
    out: Path,
    *,
    onto: Onto,
    storage: Storage = "bf16",
    threads: int | None = None,
    progress: Progress = lambda _done, _all: None,
) -> MergeReport:
    """Merge the adapter in ``adapter`` into the checkpoint ``base``, and write a checkpoint to ``out``.

    ``adapter`` is a release's folder or a plain PEFT one. The result has the base's shards, its
    weights in bfloat16 or (all linear layers but the head) quantized to ``storage`` by rounding to nearest,
    and loads with transformers alone. Of a release it is a release too, of kind ``merged`` or ``quantized``,
    and the base must have the digests that the adapter's manifest names. ``threads`` defaults to the
    processors at hand and changes no byte of the weights.

    Raises ReleaseError when a factor matches nothing in the base or cannot be merged right, or when ``out``
    exists; BaseMismatchError for another base; SignatureError for a changed file of the release; OSError
    for a full disk. Nothing is left behind then.
    """
    started = time.monotonic()
    source = _open_release(adapter)
    lock = source.manifest.base if source else None
    if lock is not None:
        check_config(lock, base)
    checkpoint = open_checkpoint(base)
    quantization = _quantization(source, onto)
    plan = plan_sums(read_adapter(adapter), checkpoint, quantization, storage)
    _check_space(out, checkpoint, plan)
    written: dict[str, FileEntry] = {}
    with _target(out, source, onto, storage, written) as staging:
        with _one_thread_each():
            shards = rewrite_files(
                _rewrites(checkpoint, plan, staging),
                threads=threads or _processors(),
                digests=source is not None,
                progress=progress,
            )
        written.update({name: digests.target for name, digests in shards.items()})
        if lock is not None:
            _check_weights(lock, base, {name: digests.source_sha256 for name, digests in shards.items()})
        write_companions(checkpoint, plan, adapter, staging)
    return MergeReport(
        out=out,
        onto=onto,
        storage=storage,
        quantization=quantization,
        tensors=len(checkpoint.tensors),
        merged=len(plan.updates.by_name),
        requantized=len(plan.quantized),
        quantized=len(plan.layout.quantized),
        size=_new_size(checkpoint, plan),
        seconds=time.monotonic() - started,
        release=Release.open(out) if source else None,
    )


def _open_release(adapter: Path) -> Release | None:
    """The release that ``adapter`` is, its files checked; None for a plain PEFT folder."""
    if not (adapter / MANIFEST_NAME).is_file():
        return None
    release = Release.open(adapter)
    if release.manifest.kind != "adapter":
        raise ReleaseError(
            f"{adapter} is of kind {release.manifest.kind!r}", "name the release of an adapter"
        )
    release.check_files()
    return release


def _quantization(source: Release | None, onto: Onto) -> Quantization | None:
    """What the base's weights went through in training, where the target asks for it.

    A plain PEFT folder does not say; QLoRA's own setting (NF4, double quantization, blocks of 64) is taken
    then.
    """
    if onto == "original":
        return None
    if source is None or source.manifest.base is None:
        return Quantization()
    return source.manifest.base.quantization


def _check_weights(lock: BaseLock, base: Path, digests: dict[str, str]) -> None:
    """Hold the base's weight files against the lock; those not in ``digests`` are hashed first."""
    others = {path.name: sha256_file(path) for path in weight_files(base) if path.name not in digests}
    check_base(lock, base, digests | others)


def _new_size(checkpoint: Checkpoint, plan: SumPlan) -> int:
    """Bytes of the new shards, but for their headers."""
    return sum(part.size for shard in checkpoint.shards for part in _stored(plan, shard))


def _stored(plan: SumPlan, shard: TensorFile) -> list[Stored]:
    """The tensors of a new shard, in order."""
    return [part for target in plan.targets(shard) for part in target.stored]


def _check_space(out: Path, checkpoint: Checkpoint, plan: SumPlan) -> None:
    """Raise OSError (ENOSPC) before the work rather than at its end."""
    needed = _new_size(checkpoint, plan) + _SPARE_BYTES
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes are needed", str(folder))


@contextmanager
def _target(
    out: Path, source: Release | None, onto: Onto, storage: Storage, written: dict[str, FileEntry]
) -> Iterator[Path]:
    """The staging folder of ``out``, a release's when the adapter is one; ``written`` are the shards."""
    if source is None:
        with staged_folder(out) as staging:
            yield staging
        return
    adapter = source.manifest
    tools = {"adapterhub": __version__} | {name: version(name) for name in _tools(onto, storage)}
    draft = adapter.model_copy(
        update={
            "name": adapter.name[: _MAX_NAME - len(_SUFFIXES[storage])] + _SUFFIXES[storage],
            "created": datetime.now(UTC).replace(microsecond=0),
            "kind": "merged" if storage == "bf16" else "quantized",
            "merge": Merge(onto=onto, dtype="bfloat16" if storage == "bf16" else storage),
            "parent": Parent(ref=f"{adapter.name}@{adapter.version}", manifest_sha256=source.digest),
            "tools": tools,
            "hardware": None,
            "files": {},
        }
    )
    with new_release(out, draft, written) as staging:
        yield staging


def _tools(onto: Onto, storage: Storage) -> tuple[str, ...]:
    """What computed: LLM.int8() is a division and a rounding, and needs torch alone."""
    return ("torch", "bitsandbytes") if onto == "trained" or storage in ("nf4", "fp4") else ("torch",)


def _rewrites(checkpoint: Checkpoint, plan: SumPlan, folder: Path) -> list[Rewrite]:
    """Every shard of the checkpoint to the same name in ``folder``."""
    return [
        Rewrite(
            source=shard,
            target=folder / shard.path.name,
            header=encode_header(
                ((part.name, part.dtype, part.shape) for part in _stored(plan, shard)), shard.metadata
            ),
            pieces=plan.pieces(shard),
        )
        for shard in checkpoint.shards
    ]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch computes each piece in the thread that asks, so that no sum depends on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
