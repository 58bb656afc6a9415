"""The end of a run: what was measured becomes evidence, and the adapter a sealed release."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.packaging import evidence
from adapterhub.packaging.manifest import BaseLock, DatasetLock, Hardware, Manifest
from adapterhub.packaging.release import Release, new_release
from adapterhub.trainer.checkpoints import run_folder
from adapterhub.trainer.initial import pissa_start
from adapterhub.trainer.plan import Plan
from adapterhub.trainer.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_TOOLS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Origin:
    """What an adapter was made from."""

    recipe: Recipe
    base: BaseLock
    datasets: tuple[DatasetLock, ...]
    hardware: Hardware


def seal(
    out: Path,
    origin: Origin,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    ledger: evidence.LedgerEvidence,
    curve: evidence.CurveEvidence,
    state: dict[str, torch.Tensor] | None = None,
) -> Release:
    """Write the release at ``out``, then remove the run folder. Raises ReleaseError when ``out`` exists.

    ``state`` holds the adapter's weights where ``model`` has only a part of them.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = origin.base.name
    config.revision = origin.base.revision
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set's order would differ from run to run
    start = pissa_start(run_folder(out)) if origin.recipe.lora.init == "pissa" else None
    with new_release(out, _draft(origin)) as staging:
        model.save_pretrained(  # "auto" would ask the Hub for the base
            staging,
            state_dict=state,
            save_embedding_layers=False,
            path_initial_model_for_weight_conversion=None if start is None else str(start),
        )
        (staging / "README.md").unlink(missing_ok=True)  # peft's own; `adapterhub card` writes the real one
        tokenizer.save_pretrained(staging)
        (staging / "evidence").mkdir()
        (staging / evidence.LEDGER).write_bytes(evidence.to_json(ledger))
        (staging / evidence.CURVE).write_bytes(evidence.to_json(curve))
    shutil.rmtree(run_folder(out))
    return Release.open(out)


def _draft(origin: Origin) -> Manifest:
    from adapterhub.version import __version__

    recipe = origin.recipe
    return Manifest(
        name=recipe.name,
        version=recipe.version,
        created=datetime.now(UTC).replace(microsecond=0),
        kind="adapter",
        task=recipe.task,
        licence=recipe.licence,
        base=origin.base,
        recipe=recipe.public_dict(),
        datasets=origin.datasets,
        tools={"adapterhub": __version__, "python": sys.version.split()[0]}
        | {name: installed_version(name) for name in _TOOLS},
        hardware=origin.hardware,
    )


def measured_ledger(
    plan: Plan, hardware: Hardware, misses: Sequence[evidence.LedgerMiss]
) -> evidence.LedgerEvidence:
    """The plan's ledger beside the measured peak, and the plans that did not fit after all."""
    measured, how = measured_peak(hardware)
    return evidence.LedgerEvidence(
        device=hardware.device,
        parts=plan.ledger.parts,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=measured,
        measured_as=how,
        misses=tuple(misses),
    )


def measured_peak(hardware: Hardware) -> tuple[int, str]:
    """The most bytes that this process held, and how that was measured.

    On CUDA since the last reset of torch's statistics; on the CPU since the process began.
    """
    if hardware.device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        reserved = torch.cuda.max_memory_reserved()
        return reserved + max(0, context), "torch's peak reserved bytes plus the CUDA context"
    scale = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return peak, "peak resident set of the training process"


def training_curve(
    history: Sequence[dict[str, Any]], steps: int, hardware: Hardware
) -> evidence.CurveEvidence:
    """The run from transformers' log history, which holds our clock and token count beside the losses."""
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
