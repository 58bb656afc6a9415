"""The run folder: what a training run keeps beside its release until it is finished."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from adapterhub.errors import TrainingError
from adapterhub.packaging.files import write_atomic

_COMPLETE = "complete"
_RUN = "run.json"


def run_folder(out: Path) -> Path:
    """Where the run that will become the release ``out`` keeps its checkpoints."""
    return out.with_name(f"{out.name}.run")


def prepare_run(out: Path, identity: dict[str, Any], *, resume: bool) -> Path | None:
    """Make or enter the run folder; return the checkpoint to go on from, None to begin.

    ``identity`` is everything that decides the result (recipe, data digests, base digest); a run is only
    resumed with the identity it began with. Checkpoints that a kill left unfinished are removed. Raises
    TrainingError when there is a run already and ``resume`` was not asked for, or when it was another run.
    """
    folder = run_folder(out)
    digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if not (folder / _RUN).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / _RUN, json.dumps({"digest": digest, **identity}, indent=2).encode() + b"\n")
        return None
    if not resume:
        raise TrainingError(
            f"{folder} holds an unfinished run", "go on with --resume, or remove that folder to begin again"
        )
    _check_identity(folder, digest, identity)
    for checkpoint in _checkpoints(folder):
        if not (checkpoint / _COMPLETE).is_file():
            shutil.rmtree(checkpoint)
    remaining = _checkpoints(folder)
    return remaining[-1] if remaining else None


def mark_complete(checkpoint: Path) -> None:
    """Say that every file of ``checkpoint`` is written; one without this mark is never resumed from."""
    write_atomic(checkpoint / _COMPLETE, b"")


def _check_identity(folder: Path, digest: str, identity: dict[str, Any]) -> None:
    try:
        began = json.loads((folder / _RUN).read_bytes())
    except ValueError as err:
        raise TrainingError(f"{folder / _RUN} is damaged", "remove that folder and begin again") from err
    if began.get("digest") == digest:
        return
    differing = sorted(key for key in identity if began.get(key) != json.loads(json.dumps(identity[key])))
    raise TrainingError(
        f"{folder} is a run with another {', '.join(differing) or 'identity'}; resumed it would be neither",
        "resume with the recipe and data it began with, or remove that folder to begin again",
    )


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
