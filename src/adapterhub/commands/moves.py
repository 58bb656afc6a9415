"""An adapter's way from one version of its base to another: found, fitted, measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import DataError, ReleaseError
from adapterhub.packaging.quantized import words_of

if TYPE_CHECKING:
    from adapterhub.packaging.adapter import Adapter
    from adapterhub.packaging.evidence import FidelityFigures
    from adapterhub.packaging.manifest import BaseLock, Quantization
    from adapterhub.packaging.release import Release
    from adapterhub.packaging.retarget import Fit, LayerFit, RetargetEvidence
    from adapterhub.packaging.variants import Variant

TOOLS = ("adapterhub", "bitsandbytes", "peft", "torch", "transformers")
_HELD_OUT = 4  # of so many texts one is measured on and the others are calibrated on


@dataclass(frozen=True)
class Move:
    """An adapter on its way from one base to another."""

    release: Release
    adapter: Adapter
    old: Variant
    new: Variant
    lock: BaseLock
    """Of the new base."""
    calibrated: Sequence[Sequence[int]]
    """Token ids."""
    measured: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Outcome:
    """What re-fitting came to."""

    folder: Path
    """Holds the new factors, as PEFT writes them."""
    layers: Sequence[LayerFit]
    as_it_was: FidelityFigures | None
    refitted: FidelityFigures | None

    @property
    def kept_is_refitted(self) -> bool:
        """Whether the new factors are the better ones, as far as that was measured."""
        if self.as_it_was is None or self.refitted is None:
            return True
        return self.refitted.kl_mean <= self.as_it_was.kl_mean


def plan_move(
    release: Release,
    base: str,
    kind: str | None,
    text: Path | None,
    limit: int | None,
    trained_on: str | None,
    endpoint: str | None,
) -> Move:
    """Find both versions of the base and read the text, before anything is computed.

    Raises ReleaseError for an adapter that cannot be re-fitted, for a base it does not fit or was trained on,
    and when nothing names the base trained on; DataError, BaseMismatchError, HubError and its kinds.
    """
    from adapterhub.packaging.adapter import read_adapter
    from adapterhub.packaging.retarget import check_refittable
    from adapterhub.packaging.variants import open_variant
    from adapterhub.trainer.model import load_tokenizer
    from adapterhub.trainer.texts import read_texts

    old_lock = release.manifest.base
    if release.manifest.kind != "adapter" or old_lock is None:
        raise ReleaseError(
            f"{release.path} is of kind {release.manifest.kind!r}", "name the release of an adapter"
        )
    adapter = read_adapter(release.path)
    check_refittable(adapter)
    texts = read_texts(text, load_tokenizer(release.path), limit=limit) if text else []
    folder, found = _find_new(base, endpoint)
    is_same = found.digest == old_lock.digest
    new = open_variant(folder, _quantization(old_lock, kind, is_same))
    if new.stored and kind is not None:
        raise ReleaseError(f"{folder} is stored in {words_of(new.quantization)} already", "leave --to out")
    lock = (old_lock if is_same else found).model_copy(update={"quantization": new.quantization})
    if lock == old_lock:
        raise ReleaseError(
            f"{base} in {words_of(new.quantization)} is what the adapter was trained on",
            "say --to another number format, or name another --base",
        )
    old = open_variant(
        _find_old(old_lock, trained_on, folder if is_same else None, endpoint), old_lock.quantization
    )
    for variant in (old, new):
        variant.check_holds(adapter)
    if 0 < len(texts) < _HELD_OUT:
        raise DataError(
            f"{len(texts)} texts are too few to fit on some and measure on others",
            f"name at least {_HELD_OUT} with --text, or none",
        )
    held = texts[_HELD_OUT - 1 :: _HELD_OUT]
    rest = [ids for number, ids in enumerate(texts, 1) if number % _HELD_OUT]
    return Move(release, adapter, old, new, lock, rest, held)


def _quantization(old: BaseLock, kind: str | None, is_same: bool) -> Quantization | None:
    """How the new base is loaded, where its files do not say."""
    from adapterhub.packaging.manifest import Quantization

    if kind is None:
        return old.quantization
    if kind == "bf16":
        return None
    settings = old.quantization or Quantization()
    if kind == settings.type and is_same:
        return settings
    changed = {"type": kind, "double": kind != "int8" and settings.double, "block_size": 64}
    return Quantization.model_validate(settings.model_dump() | changed)


def _find_new(base: str, endpoint: str | None) -> tuple[Path, BaseLock]:
    from adapterhub.packaging.base import lock_base

    if Path(base).is_dir():
        return Path(base), lock_base(Path(base), name=Path(base).resolve().name)
    from adapterhub.commands.targets import naming_folder_or_ref
    from adapterhub.hub.bases import fetch_base

    with naming_folder_or_ref(base):
        fetched = fetch_base(base, endpoint=endpoint)
    return fetched.folder, lock_base(
        fetched.folder, name=fetched.name, revision=fetched.revision, weights=fetched.weights
    )


def _find_old(lock: BaseLock, trained_on: str | None, same: Path | None, endpoint: str | None) -> Path:
    """The base trained on, held against its digests; ``same`` is the new base's folder where it is that."""
    from adapterhub.load import find_base

    if trained_on is None and same is not None:
        return find_base(lock, same)
    if trained_on is None and lock.revision is None:
        raise ReleaseError(
            f"--base is not {lock.name} as trained on, which names no commit on a Hub",
            "name the folder of the base trained on with --trained-on",
        )
    return find_base(lock, trained_on, endpoint=endpoint)


def refit_move(move: Move, scratch: Path) -> Outcome:
    """Fit all layers, and measure both adapters where there is text."""
    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.load import load_release
    from adapterhub.packaging.retarget import refit_layers, write_factors

    live = None
    if move.calibrated:
        live, _tokenizer = load_release(move.release, move.old.folder)
    fits: dict[str, Fit] = {}
    with progress_on_stderr("layers") as report:
        for layers, moments in _moments(move, live):
            for fit in refit_layers(move.adapter, move.old, move.new, moments, layers):
                fits[fit.report.name] = fit
                report("re-fitting", len(fits), len(move.adapter.pairs))
    folder = scratch / "refitted"
    folder.mkdir()
    write_factors(folder, move.adapter, {name: (fit.a, fit.b) for name, fit in fits.items()}, move.lock.name)
    reports = [fit.report for fit in fits.values()]
    fits.clear()
    if live is None:
        return Outcome(folder, reports, None, None)
    before, after = _measure(move, live, folder)
    return Outcome(folder, reports, before, after)


def _moments(move: Move, live: Any) -> Iterator[tuple[list[str], dict[str, Any]]]:
    from adapterhub.packaging.moments import group_layers, second_moments

    if live is None:
        yield list(move.adapter.pairs), {}
        return
    widths = {name: pair.in_features for name, pair in move.adapter.pairs.items()}
    for layers in group_layers(widths):
        yield layers, second_moments(live, layers, move.calibrated)


def _measure(move: Move, live: Any, refitted: Path) -> tuple[FidelityFigures, FidelityFigures]:
    """Both adapters on the new base, against the live model that was released."""
    import warnings

    from peft import PeftModel

    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.load import default_device
    from adapterhub.packaging.fidelity import compare_models
    from adapterhub.trainer.model import load_base

    plain = load_base(move.new.folder, move.new.quantization, default_device())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers by an old name
        model = PeftModel.from_pretrained(plain, str(move.release.path), adapter_name="as_it_was").eval()
        model.load_adapter(str(refitted), adapter_name="refitted")
    figures = []
    with progress_on_stderr("texts") as report:
        for name in ("as_it_was", "refitted"):
            model.set_adapter(name)
            told = partial(report, name.replace("_", " "))
            figures.append(compare_models(live, model, move.measured, report=told))
    return figures[0], figures[1]


def describe_move(move: Move, outcome: Outcome, text: Path | None, began: float) -> RetargetEvidence:
    """What is written into the release; ``began`` is when it started, on time.perf_counter's clock."""
    from adapterhub.packaging.adapter import WEIGHTS_NAME
    from adapterhub.packaging.files import sha256_file
    from adapterhub.packaging.retarget import RetargetEvidence
    from adapterhub.trainer.hardware import detect_hardware

    manifest = move.release.manifest
    assert manifest.base is not None
    kept = outcome.folder if outcome.kept_is_refitted else move.release.path
    return RetargetEvidence(
        parent=f"{manifest.name}@{manifest.version}",
        parent_sha256=move.release.digest,
        adapter_sha256=sha256_file(kept / WEIGHTS_NAME),
        old_base=manifest.base,
        new_base=move.lock,
        weighting="inputs" if move.calibrated else "none",
        kept="refitted" if outcome.kept_is_refitted else "as it was",
        layers=tuple(outcome.layers),
        text=text.name if text else None,
        text_sha256=sha256_file(text) if text else None,
        calibrated=len(move.calibrated),
        measured=len(move.measured),
        as_it_was=outcome.as_it_was,
        refitted=outcome.refitted,
        tools={name: version(name) for name in TOOLS},
        hardware=detect_hardware(),
        seconds=round(time.perf_counter() - began, 1),
    )
