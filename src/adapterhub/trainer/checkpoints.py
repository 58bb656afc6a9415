"""The run folder: what a training run keeps beside its release until it is finished."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from adapterhub.errors import TrainingError
from adapterhub.packaging.files import fsync_folder, write_atomic

_COMPLETE = "complete"
_RUN = "run.json"


def run_folder(out: Path) -> Path:
    """Where the run that will become the release ``out`` keeps its checkpoints."""
    return out.with_name(f"{out.name}.run")


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold the run folder of ``out``, made if missing, for this process alone; a kill lets go of it.

    Raises TrainingError when another process trains into it.
    """
    folder = run_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise TrainingError(
                f"another process is training into {folder}", "wait for it, or choose another --out"
            ) from err
        yield
    finally:
        os.close(descriptor)


def prepare_run(out: Path, identity: dict[str, Any], *, resume: bool) -> Path | None:
    """Enter the run folder of ``out``, held by ``run_lock``; return the checkpoint to go on from, or None.

    ``identity`` is recipe, data digests and base digest: a run is only resumed with those it began with.
    Checkpoints that a kill left unfinished are removed; a run without a finished one begins anew. Raises
    TrainingError when there is something to go on from and ``resume`` was not asked for, or when it was
    another run.
    """
    folder = run_folder(out)
    digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    finished = [checkpoint for checkpoint in _checkpoints(folder) if is_complete(checkpoint)]
    if finished and not resume:
        raise TrainingError(
            f"{folder} holds an unfinished run", "go on with --resume, or remove that folder to begin again"
        )
    if finished:
        _check_identity(folder, digest, identity)
    else:
        write_atomic(folder / _RUN, json.dumps({"digest": digest, **identity}, indent=2).encode() + b"\n")
    for checkpoint in _checkpoints(folder):
        if checkpoint not in finished:
            shutil.rmtree(checkpoint)
    return finished[-1] if finished else None


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps that were done when ``checkpoint`` was made; 0 for none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def mark_complete(checkpoint: Path) -> None:
    """Bring every file of ``checkpoint`` to the disk, then say so; without this mark none is resumed from."""
    for root, _folders, names in os.walk(checkpoint):
        for name in names:
            with (Path(root) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(root))
    write_atomic(checkpoint / _COMPLETE, b"")


def is_complete(checkpoint: Path) -> bool:
    """Whether ``checkpoint`` is there and was finished."""
    return (checkpoint / _COMPLETE).is_file()


def _check_identity(folder: Path, digest: str, identity: dict[str, Any]) -> None:
    try:
        began = json.loads((folder / _RUN).read_bytes())
    except (OSError, ValueError):
        began = None
    if not isinstance(began, dict):
        raise TrainingError(f"{folder / _RUN} is damaged", "remove that folder and begin again")
    if began.get("digest") == digest:
        return
    differing = sorted(key for key in identity if began.get(key) != json.loads(json.dumps(identity[key])))
    raise TrainingError(
        f"{folder} is a run with another {', '.join(differing) or 'identity'}; resumed it would be neither",
        "resume with the recipe and data it began with, or remove that folder to begin again",
    )


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of)
