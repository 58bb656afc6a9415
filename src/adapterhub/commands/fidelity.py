"""fidelity."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.targets import base_mismatch_option, cached_ref
from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    from adapterhub.packaging.evidence import FidelityEvidence
    from adapterhub.packaging.manifest import BaseLock, BaseMismatch
    from adapterhub.packaging.release import Release

    FindBase = Callable[[BaseLock | None], Path]

_WORST_SHOWN = 3


@dataclass(frozen=True)
class _Side:
    """One of the two models, loaded."""

    name: str
    folder: Path
    release: Release | None
    """None for a plain checkpoint folder."""
    model: Any
    tokenizer: Any


@click.command("fidelity")
@click.argument("reference", metavar="A")
@click.argument("candidate", metavar="B")
@click.option(
    "--text", required=True, type=click.Path(path_type=Path), help="Rows like test.jsonl, or plain text."
)
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first so many rows or windows.")
@click.option("--base", metavar="DIR|REF", help="The base of an adapter release. Default: the one it names.")
@base_mismatch_option
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def fidelity_command(
    reference: str,
    candidate: str,
    text: Path,
    limit: int | None,
    base: str | None,
    allow_base_mismatch: str | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Measure how faithfully model B stands in for model A, on every token of a text.

    A and B are releases (a folder, or owner/name[@version]) or checkpoint folders. An adapter release runs
    live: its base as it was quantized in training, with the adapter attached. When B is the folder of a
    release that is not signed, the figures are written into it, as evidence/fidelity.json.
    """
    from adapterhub.load import find_base
    from adapterhub.packaging.evidence import FIDELITY, to_json

    mismatches: list[BaseMismatch] = []
    find = partial(
        find_base,
        base=base,
        endpoint=endpoint,
        allow_mismatch=allow_base_mismatch,
    )
    a, b = (
        _load(target, base, endpoint, allow_base_mismatch, mismatches) for target in (reference, candidate)
    )
    evidence = _measure(a, b, text, limit, find)
    evidence = evidence.model_copy(update={"base_mismatch": next(iter(mismatches), None)})
    click.echo(_as_json(evidence) if as_json else _as_text(evidence))
    if b.release is None or not Path(candidate).is_dir() or cached_ref(Path(candidate)) is not None:
        return
    if b.release.is_signed:
        click.echo(f"{b.folder} is signed, so {FIDELITY} was not written into it", err=True)
        return
    b.release.with_files({FIDELITY: to_json(evidence)})


def _load(
    target: str,
    base: str | None,
    endpoint: str | None,
    allow_base_mismatch: str | None,
    mismatches: list[BaseMismatch],
) -> _Side:
    """The model that ``target`` names. Raises ReleaseError for a folder that holds none."""
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
        return _Side(folder.resolve().name, folder, None, model, load_tokenizer(folder))
    release = open_release(target, endpoint=endpoint)
    release.check_files()
    model, tokenizer = load_release(
        release, base, endpoint=endpoint, allow_base_mismatch=allow_base_mismatch, note=mismatches.append
    )
    manifest = release.manifest
    return _Side(f"{manifest.name}@{manifest.version}", release.path, release, model, tokenizer)


def _measure(a: _Side, b: _Side, text: Path, limit: int | None, find: FindBase) -> FidelityEvidence:
    from importlib.metadata import version

    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.packaging.base import base_digest, weight_files
    from adapterhub.packaging.evidence import FidelityEvidence
    from adapterhub.packaging.fidelity import compare_models
    from adapterhub.packaging.files import sha256_file
    from adapterhub.trainer.hardware import detect_hardware
    from adapterhub.trainer.texts import read_texts

    texts = read_texts(text, a.tokenizer, limit=limit)
    survival = _survival(a, b, find)  # before the first forward, see weights_in
    began = time.perf_counter()
    with progress_on_stderr() as report:
        figures = compare_models(
            a.model, b.model, texts, report=lambda done, total: report("comparing", done, total)
        )
    return FidelityEvidence(
        reference=a.name,
        reference_sha256=a.release.digest if a.release else None,
        weights_digest=base_digest({path.name: sha256_file(path) for path in weight_files(b.folder)}),
        text=text.name,
        text_sha256=sha256_file(text),
        texts=len(texts),
        limit=limit,
        figures=figures,
        delta_survival=survival,
        tools={
            name: version(name) for name in ("adapterhub", "bitsandbytes", "peft", "torch", "transformers")
        },
        hardware=detect_hardware(),
        seconds=round(time.perf_counter() - began, 1),
    )


def _survival(a: _Side, b: _Side, find: FindBase) -> float | None:
    """Delta survival, where B was made from A by a merge; None elsewhere."""
    from adapterhub.packaging.adapter import read_adapter
    from adapterhub.packaging.checkpoint import open_checkpoint
    from adapterhub.packaging.survival import measure_survival, weights_in, weights_of

    if a.release is None or a.release.manifest.kind != "adapter" or b.release is None:
        return None
    merged = b.release.manifest
    if merged.merge is None or merged.parent is None or merged.parent.manifest_sha256 != a.release.digest:
        return None
    adapter = read_adapter(a.folder)
    if merged.merge.onto == "trained":
        before = weights_in(a.model)
    else:
        folder = find(a.release.manifest.base)
        before = weights_of(open_checkpoint(folder), adapter)
    return measure_survival(adapter, before, weights_in(b.model))


def _as_json(evidence: FidelityEvidence) -> str:
    return json.dumps(evidence.model_dump(mode="json"), indent=2, ensure_ascii=False)


def _as_text(evidence: FidelityEvidence) -> str:
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
    worst = sorted(figures.layers, key=lambda layer: -layer.relative_error)[:_WORST_SHOWN]
    lines += [("layer", f"{layer.name}: relative error {layer.relative_error:.4f}") for layer in worst]
    return "\n".join(f"{label:<12} {value}" for label, value in lines)
