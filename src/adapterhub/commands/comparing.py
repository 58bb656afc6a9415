"""Two models beside each other: what is loaded, measured, and said about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    from adapterhub.packaging.evidence import FidelityEvidence
    from adapterhub.packaging.manifest import BaseMismatch
    from adapterhub.packaging.release import Release

_WORST_SHOWN = 3


@dataclass(frozen=True)
class Side:
    """One of the two models, loaded."""

    name: str
    folder: Path
    release: Release | None
    """None for a plain checkpoint folder."""
    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class MeasuredText:
    """What both models are asked about."""

    path: Path
    texts: Sequence[Sequence[int]]
    """Token ids."""
    skipped: int = 0
    """Texts of the file before them."""
    limit: int | None = None
    """How many were asked for; None: all."""


def load_side(
    target: str,
    base: str | None,
    endpoint: str | None,
    allow_base_mismatch: str | None,
    mismatches: list[BaseMismatch],
) -> Side:
    """The model that ``target`` names, a release or a checkpoint folder; other bases go to ``mismatches``.

    Raises ReleaseError for a folder that holds no model, and what ``load.load_release`` raises.
    """
    from adapterhub.load import default_device, load_release, open_release
    from adapterhub.packaging.checkpoint import CONFIG_NAME
    from adapterhub.packaging.manifest import MANIFEST_NAME
    from adapterhub.trainer.model import load_base, load_tokenizer

    folder = Path(target)
    if folder.is_dir() and not (folder / MANIFEST_NAME).is_file():
        if not (folder / CONFIG_NAME).is_file():
            raise ReleaseError(
                f"{folder} is neither a release nor a checkpoint that loads alone",
                "name a release that `adapterhub train` or `merge` made, or a folder with config.json",
            )
        model = load_base(folder, None, default_device()).eval()
        return Side(folder.resolve().name, folder, None, model, load_tokenizer(folder))
    release = open_release(target, endpoint=endpoint)
    release.check_files()
    model, tokenizer = load_release(
        release, base, endpoint=endpoint, allow_base_mismatch=allow_base_mismatch, note=mismatches.append
    )
    manifest = release.manifest
    return Side(f"{manifest.name}@{manifest.version}", release.path, release, model, tokenizer)


def measure_fidelity(a: Side, b: Side, text: MeasuredText, survival: float | None) -> FidelityEvidence:
    """Ask both about ``text``; ``survival`` must be measured before, see ``survival.weights_in``."""
    from importlib.metadata import version

    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.packaging.base import base_digest, weight_files
    from adapterhub.packaging.evidence import FidelityEvidence
    from adapterhub.packaging.fidelity import compare_models
    from adapterhub.packaging.files import sha256_file
    from adapterhub.trainer.hardware import detect_hardware

    began = time.perf_counter()
    with progress_on_stderr("texts") as report:
        figures = compare_models(
            a.model, b.model, text.texts, report=lambda done, total: report("comparing", done, total)
        )
    return FidelityEvidence(
        reference=a.name,
        reference_sha256=a.release.digest if a.release else None,
        weights_digest=base_digest({path.name: sha256_file(path) for path in weight_files(b.folder)}),
        text=text.path.name,
        text_sha256=sha256_file(text.path),
        texts=len(text.texts),
        skipped=text.skipped,
        limit=text.limit,
        figures=figures,
        delta_survival=survival,
        tools={
            name: version(name) for name in ("adapterhub", "bitsandbytes", "peft", "torch", "transformers")
        },
        hardware=detect_hardware(),
        seconds=round(time.perf_counter() - began, 1),
    )


def measure_kept(adapter: Path, live: Any, base: Path | None, merged: Any) -> float | None:
    """Delta survival in a merged model, of the update of ``adapter``; before either answers anything.

    ``base`` is the folder of the 16-bit weights that it was added to; None for the ``live`` model's own.
    None for an adapter without factors on linear layers, of which it is the share.
    """
    from adapterhub.packaging.adapter import read_adapter
    from adapterhub.packaging.checkpoint import open_checkpoint
    from adapterhub.packaging.survival import measure_survival, weights_in, weights_of

    found = read_adapter(adapter)
    if not found.pairs:
        return None
    before = weights_in(live) if base is None else weights_of(open_checkpoint(base), found)
    return measure_survival(found, before, weights_in(merged))


def describe_evidence(evidence: FidelityEvidence) -> str:
    """The figures for a terminal, a line each."""
    figures = evidence.figures
    lines = [
        ("reference", evidence.reference),
        ("text", f"{evidence.text}: {figures.tokens:,} tokens in {evidence.texts} texts"),
        ("KL", f"{figures.kl_mean:.4f} nats a token, 99th percentile {figures.kl_p99:.3f}"),
        ("top-1", f"{figures.top1_agreement:.4f} of tokens agree"),
        ("NLL", f"{figures.candidate_nll:.4f} nats a token, reference {figures.reference_nll:.4f}"),
        ("perplexity", f"{figures.candidate_perplexity:.3f}, reference {figures.reference_perplexity:.3f}"),
    ]
    survival = evidence.delta_survival
    lines.append(("survival", f"{survival:.4f} of the update" if survival is not None else "not measured"))
    lines += [("layer", worst) for worst in worst_layers(evidence)]
    return "\n".join(f"{label:<12} {value}" for label, value in lines)


def worst_layers(evidence: FidelityEvidence) -> list[str]:
    """The layers whose outputs are furthest from the reference's, in words."""
    worst = sorted(evidence.figures.layers, key=lambda layer: -layer.relative_error)[:_WORST_SHOWN]
    return [f"{layer.name}: relative error {layer.relative_error:.4f}" for layer in worst]
