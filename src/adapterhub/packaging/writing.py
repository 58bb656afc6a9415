"""Writing a planned checkpoint whole: shards, their companions, the manifest; a killed run is resumed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from adapterhub.packaging.checkpoint import Checkpoint
from adapterhub.packaging.companions import write_companions
from adapterhub.packaging.layout import Storage, Stored
from adapterhub.packaging.manifest import FileEntry, Manifest
from adapterhub.packaging.release import seal_folder
from adapterhub.packaging.shards import Digests, Progress, Rewrite, rewrite_files
from adapterhub.packaging.staging import Staging, resumable_folder
from adapterhub.packaging.sums import SumPlan
from adapterhub.packaging.tensors import TensorFile, encode_header
from adapterhub.version import __version__

Prepare = Callable[[Path, str], None]
"""Told a folder to work in, and what is made of what, before the plan's pieces are asked for."""
Examine = Callable[[Path], Mapping[str, bytes]]
"""Told the folder of the finished checkpoint; gives files to put beside it, or raises to refuse it."""
CheckSources = Callable[[Mapping[str, str]], None]
"""Told the sha256 of each shard of the source by its name; raises when one is not what it should be."""

SUFFIXES: dict[Storage, str] = {"bf16": "-merged", "nf4": "-nf4", "fp4": "-fp4", "int8": "-int8"}
_MAX_NAME = 96
_SPARE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Written:
    """What was written."""

    size: int
    """Bytes of the new tensors."""
    resumed: int
    """Shards that an earlier run had finished."""


def write_checkpoint(
    checkpoint: Checkpoint,
    plan: SumPlan,
    out: Path,
    *,
    inputs: Mapping[str, object],
    tokenizer: Path,
    draft: Manifest | None,
    check_sources: CheckSources | None,
    prepare: Prepare | None = None,
    examine: Examine | None = None,
    threads: int | None,
    progress: Progress,
) -> Written:
    """Write what ``plan`` makes of ``checkpoint`` to ``out``; it is a release when there is a ``draft``.

    ``inputs`` name what it is made of and how, beside the checkpoint itself: a run that was cut off goes on
    where all of it is the same. ``threads`` defaults to the processors at hand and changes no byte. Raises
    ReleaseError when ``out`` exists, what ``prepare``, ``check_sources`` and ``examine`` raise, and OSError
    for a full disk; nothing is left behind then.
    """
    size = sum(part.size for shard in checkpoint.shards for part in _stored(plan, shard))
    key = key_of(checkpoint, inputs)
    with resumable_folder(out, key) as staging:
        resumed = len(staging.done)
        todo = [shard for shard in checkpoint.shards if shard.path.name not in staging.done]
        if prepare is not None:
            prepare(staging.scratch, key)
        _check_space(out, sum(part.size for shard in todo for part in _stored(plan, shard)))
        digests = draft is not None or check_sources is not None
        with _one_thread_each():
            rewrite_files(
                [_rewrite(shard, plan, staging.folder) for shard in todo],
                threads=threads or processors(),
                digests=digests,
                progress=progress,
                finished=lambda name, made: _note(staging, name, made),
            )
        if check_sources is not None:
            check_sources({name: facts["source"] for name, facts in staging.done.items()})
        write_companions(checkpoint, plan, tokenizer, staging.folder)
        if examine is not None:
            _add_files(staging.folder, examine(staging.folder))
        if draft is not None:
            known = {name: FileEntry(**facts["target"]) for name, facts in staging.done.items()}
            seal_folder(staging.folder, draft, known)
    return Written(size, resumed)


def key_of(checkpoint: Checkpoint, inputs: Mapping[str, object]) -> str:
    """What is made of what, in one line: only where it is the same may a run go on with another's files."""
    return json.dumps({"inputs": inputs, "base": _identify(checkpoint), "tools": _tools()}, sort_keys=True)


def _add_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, data in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def processors() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name_of(parent: str, storage: Storage) -> str:
    """The name of what is made of the release ``parent``."""
    suffix = SUFFIXES[storage]
    return parent[: _MAX_NAME - len(suffix)] + suffix


def _note(staging: Staging, name: str, made: Digests | None) -> None:
    if made is None:
        staging.note(name, None, {})
    else:
        staging.note(
            name, made.target.sha256, {"source": made.source_sha256, "target": made.target.model_dump()}
        )


def _identify(checkpoint: Checkpoint) -> dict[str, object]:
    """What tells this checkpoint from another without reading it: names, sizes and times of its shards."""
    facts = ((shard.path.name, shard.path.stat()) for shard in checkpoint.shards)
    return {name: [found.st_size, found.st_mtime_ns] for name, found in facts} | {"config": checkpoint.config}


def _tools() -> dict[str, str]:
    return {"adapterhub": __version__} | {name: version(name) for name in ("bitsandbytes", "torch")}


def _stored(plan: SumPlan, shard: TensorFile) -> list[Stored]:
    """The tensors of a new shard, in order."""
    return [part for target in plan.targets(shard) for part in target.stored]


def _rewrite(shard: TensorFile, plan: SumPlan, folder: Path) -> Rewrite:
    """A shard to the same name in ``folder``."""
    tensors = ((part.name, part.dtype, part.shape) for part in _stored(plan, shard))
    header = encode_header(tensors, shard.metadata)
    return Rewrite(source=shard, target=folder / shard.path.name, header=header, pieces=plan.pieces(shard))


def _check_space(out: Path, size: int) -> None:
    """Raise OSError (ENOSPC) before the work rather than at its end."""
    needed = size + _SPARE_BYTES
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes are needed", str(folder))


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
