"""Merging an adapter into its base: W + s·B·A, streamed from safetensors to safetensors.

Arithmetic is in float32 and rounded once, to bfloat16. ``onto="original"`` adds to the base's own weights;
``onto="trained"`` adds to what 4-bit quantization makes of them, which is what the optimizer saw in QLoRA
(https://arxiv.org/abs/2305.14314), and so replaces every quantized weight, adapted or not.
"""

from __future__ import annotations

import errno
import math
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
from adapterhub.packaging.manifest import MANIFEST_NAME, BaseLock, FileEntry, Merge, Parent, Quantization
from adapterhub.packaging.release import Release, new_release
from adapterhub.packaging.shards import Progress, Rewrite, rewrite_files
from adapterhub.packaging.sums import SumPlan, plan_sums, target_dtype
from adapterhub.packaging.tensors import DTYPE_BYTES, encode_header
from adapterhub.version import __version__

Onto = Literal["original", "trained"]

_SPARE_BYTES = 64 * 1024 * 1024
_SUFFIX = "-merged"
_MAX_NAME = 96


@dataclass(frozen=True)
class MergeReport:
    """What a merge made."""

    out: Path
    onto: Onto
    quantization: Quantization | None
    """What the base's linear layers went through; None when they kept their own weights."""
    tensors: int
    """All tensors of the checkpoint."""
    merged: int
    """Those that an adapter was added to."""
    requantized: int
    """Those that went through 4 bits."""
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
    threads: int | None = None,
    progress: Progress = lambda _done, _all: None,
) -> MergeReport:
    """Merge the adapter in ``adapter`` into the checkpoint ``base``, and write a checkpoint to ``out``.

    ``adapter`` is a release's folder or a plain PEFT one. The result has the base's shards and index, its
    weights in bfloat16, and loads with transformers alone. Of a release it is a release too, of kind
    ``merged``, and the base must have the digests that the adapter's manifest names. ``threads`` defaults
    to the processors at hand and changes no byte of the weights.

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
    plan = plan_sums(read_adapter(adapter), checkpoint, quantization)
    _check_space(out, checkpoint)
    written: dict[str, FileEntry] = {}
    with _target(out, source, onto, written) as staging:
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
        write_companions(checkpoint, adapter, staging)
    return MergeReport(
        out=out,
        onto=onto,
        quantization=quantization,
        tensors=len(checkpoint.tensors),
        merged=len(plan.pairs),
        requantized=len(plan.quantized),
        size=_new_size(checkpoint),
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


def _new_size(checkpoint: Checkpoint) -> int:
    """Bytes of the new shards, but for their headers."""
    entries = checkpoint.tensors.values()
    return sum(math.prod(entry.shape) * DTYPE_BYTES[target_dtype(entry)] for entry in entries)


def _check_space(out: Path, checkpoint: Checkpoint) -> None:
    """Raise OSError (ENOSPC) before the work rather than at its end."""
    needed = _new_size(checkpoint) + _SPARE_BYTES
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes are needed", str(folder))


@contextmanager
def _target(out: Path, source: Release | None, onto: Onto, written: dict[str, FileEntry]) -> Iterator[Path]:
    """The staging folder of ``out``, a release's when the adapter is one; ``written`` are the shards."""
    if source is None:
        with staged_folder(out) as staging:
            yield staging
        return
    adapter = source.manifest
    tools = {"adapterhub": __version__} | {name: version(name) for name in _tools(onto)}
    draft = adapter.model_copy(
        update={
            "name": adapter.name[: _MAX_NAME - len(_SUFFIX)] + _SUFFIX,
            "created": datetime.now(UTC).replace(microsecond=0),
            "kind": "merged",
            "merge": Merge(onto=onto),
            "parent": Parent(ref=f"{adapter.name}@{adapter.version}", manifest_sha256=source.digest),
            "tools": tools,
            "hardware": None,
            "files": {},
        }
    )
    with new_release(out, draft, written) as staging:
        yield staging


def _tools(onto: Onto) -> tuple[str, ...]:
    return ("torch", "bitsandbytes") if onto == "trained" else ("torch",)


def _rewrites(checkpoint: Checkpoint, plan: SumPlan, folder: Path) -> list[Rewrite]:
    """Every shard of the checkpoint to the same name in ``folder``."""
    return [
        Rewrite(
            source=shard,
            target=folder / shard.path.name,
            header=encode_header(
                ((entry.name, target_dtype(entry), entry.shape) for entry in shard.entries), shard.metadata
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
