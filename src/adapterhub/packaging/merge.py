"""Merging adapters into their base: W + s·B·A, streamed from safetensors to safetensors.

Arithmetic is in float32 and rounded once, to bfloat16 or to a quantized weight's codes. ``onto="original"``
adds to the base's own weights; ``onto="trained"`` adds to what 4-bit quantization makes of them, which is
what the optimizer saw in QLoRA (https://arxiv.org/abs/2305.14314), and so replaces every quantized weight,
adapted or not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from adapterhub.errors import BaseMismatchError, ReleaseError
from adapterhub.packaging.adapter import Adapter, read_adapter
from adapterhub.packaging.base import base_digest, check_base, weight_files
from adapterhub.packaging.calibration.calibrate import CalibrationText, Rounding, add_rounding, note_text
from adapterhub.packaging.checkpoint import open_checkpoint
from adapterhub.packaging.combination import Combine, CombinedAdapter, combine_adapters
from adapterhub.packaging.evidence import RoundingEvidence
from adapterhub.packaging.files import sha256_file
from adapterhub.packaging.layout import Storage
from adapterhub.packaging.manifest import (
    MANIFEST_NAME,
    BaseLock,
    BaseMismatch,
    Manifest,
    Merge,
    MergedAdapter,
    Parent,
    Quantization,
)
from adapterhub.packaging.quantized import words_of
from adapterhub.packaging.release import Release
from adapterhub.packaging.shards import Progress
from adapterhub.packaging.sums import plan_sums
from adapterhub.packaging.verification import check_release
from adapterhub.packaging.writing import Examine, name_of, write_checkpoint
from adapterhub.version import __version__

Onto = Literal["original", "trained"]


@dataclass(frozen=True)
class Combination:
    """Other adapters to merge together with the first, and how."""

    others: Sequence[tuple[Path, float]]
    """Their folders and weights."""
    weight: float = 1.0
    """The first adapter's."""
    combine: Combine = "cat"
    density: float = 1.0
    seed: int = 0


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
    resumed: int
    """Shards that an earlier run had finished before it was cut off."""
    seconds: float
    release: Release | None
    """None for a plain PEFT folder."""
    rounding: RoundingEvidence | None = None
    """What choosing 4-bit codes on text gained; None for rounding to nearest."""


def merge_adapter(
    adapter: Path,
    base: Path,
    out: Path,
    *,
    onto: Onto,
    storage: Storage = "bf16",
    combination: Combination | None = None,
    allow_base_mismatch: str | None = None,
    calibration: CalibrationText | None = None,
    examine: Examine | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = lambda _done, _all: None,
) -> MergeReport:
    """Merge the adapter in ``adapter`` into the checkpoint ``base``, and write a checkpoint to ``out``.

    ``adapter`` is a release's folder or a plain PEFT one; ``combination`` adds others to it, which must be of
    the same base. The result has the base's shards, its weights in bfloat16 or (all linear layers but the
    head) quantized to ``storage`` by rounding to nearest, or with 4-bit codes chosen on ``calibration`` (see
    ``adapterhub.packaging.calibration``), and loads with transformers alone. Of a release it is a release
    too, of kind ``merged`` or ``quantized``, and the base must have the digests that the adapter's manifest
    names, unless ``allow_base_mismatch`` says why another will do, which the new manifest records.
    ``examine`` is told the finished folder before it gets its name, and may add files to it or refuse it.
    ``device`` quantizes (its own codes where a number lies between two); ``threads`` defaults to the
    processors at hand and changes no byte where codes are not chosen on text.

    Raises ReleaseError when a tensor matches nothing in the base or cannot be merged right, or when ``out``
    exists; BaseMismatchError for another base; SignatureError for a changed file of the release; OSError
    for a full disk: nothing is left behind then. A merge that was killed or interrupted leaves its finished
    shards beside ``out``, and the same call goes on from them.
    """
    started = time.monotonic()
    source = _open_release(adapter)
    releases = {path: _open_release(path) for path, _weight in (combination.others if combination else ())}
    locks = base_locks({adapter: source, **releases})
    lock = next(iter(locks.values()), None)
    mismatch = _look_at_base(lock, base, allow_base_mismatch)
    checkpoint = open_checkpoint(base)
    quantization = trained_in(locks) if onto == "trained" else None
    plan = plan_sums(read_adapters(adapter, combination), checkpoint, quantization, storage, device)
    rounding = Rounding(checkpoint, plan, calibration) if calibration else None
    written = write_checkpoint(
        checkpoint,
        replace(plan, chosen=rounding.load) if rounding else plan,
        out,
        inputs=inputs_of(adapter, onto, storage, device, combination) | note_text(calibration),
        tokenizer=adapter,
        draft=_draft(source, onto, storage, combination, releases, mismatch, rounding) if source else None,
        check_sources=(lambda digests: _check_weights(lock, base, digests, mismatch)) if lock else None,
        prepare=rounding.choose if rounding else None,
        examine=add_rounding(rounding, examine),
        threads=threads,
        progress=progress,
    )
    return MergeReport(
        out=out,
        onto=onto,
        storage=storage,
        quantization=quantization,
        tensors=len(checkpoint.tensors),
        merged=len(plan.updates.by_name),
        requantized=len(plan.quantized),
        quantized=len(plan.layout.quantized),
        size=written.size,
        resumed=written.resumed,
        seconds=time.monotonic() - started,
        release=Release.open(out) if source else None,
        rounding=rounding.evidence() if rounding else None,
    )


def read_adapters(adapter: Path, combination: Combination | None) -> Adapter | CombinedAdapter:
    """The adapter, or those together; raises as ``read_adapter`` and ``combine_adapters`` do."""
    first = read_adapter(adapter)
    if combination is None:
        return first
    return combine_adapters(
        [first, *(read_adapter(folder) for folder, _weight in combination.others)],
        [combination.weight, *(weight for _folder, weight in combination.others)],
        combine=combination.combine,
        density=combination.density,
        seed=combination.seed,
    )


def inputs_of(
    adapter: Path, onto: Onto | None, storage: Storage, device: str, combination: Combination | None
) -> dict[str, object]:
    """What decides the bytes of the result, beside the base and the text; ``onto`` None for both targets."""
    others = combination.others if combination else ()
    folders = [adapter, *(folder for folder, _weight in others)]
    named = [
        sha256_file(folder / name)
        for folder in folders
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    manifests = [folder / MANIFEST_NAME for folder in folders]
    releases = [sha256_file(path) if path.is_file() else None for path in manifests]
    settings: list[object] = [onto, storage, device]
    if combination is not None:
        weights = [combination.weight, *(weight for _folder, weight in others)]
        settings += [weights, combination.combine, combination.density, combination.seed]
    return {"adapters": named, "releases": releases, "settings": settings}


def _open_release(adapter: Path) -> Release | None:
    """The release that ``adapter`` is, its files and signatures checked; None for a plain PEFT folder."""
    if not (adapter / MANIFEST_NAME).is_file():
        return None
    kind = Release.open(adapter).manifest.kind
    if kind != "adapter":
        raise ReleaseError(f"{adapter} is of kind {kind!r}", "name the release of an adapter")
    return check_release(adapter).release


def base_locks(releases: Mapping[Path, Release | None]) -> dict[Path, BaseLock]:
    """The bases that releases were trained on, which are one; a plain PEFT folder does not say.

    Raises BaseMismatchError when they are not.
    """
    manifests = {folder: release.manifest for folder, release in releases.items() if release is not None}
    locks = {folder: manifest.base for folder, manifest in manifests.items() if manifest.base is not None}
    for folder, lock in locks.items():
        first, expected = next(iter(locks.items()))
        if lock.digest != expected.digest:
            raise BaseMismatchError(
                f"{folder} was trained on another base than {first}", "combine adapters of one base"
            )
    return locks


def trained_in(locks: Mapping[Path, BaseLock]) -> Quantization | None:
    """What the base's weights went through in training; None: nothing, they were in 16 bits.

    Where nobody says, QLoRA's own setting is taken (NF4, double quantization, blocks of 64). Raises
    ReleaseError when adapters saw different weights.
    """
    seen = {
        lock.quantization and (lock.quantization.type, lock.quantization.double, lock.quantization.block_size)
        for lock in locks.values()
    }
    if len(seen) > 1:
        told = "; ".join(f"{folder}: {words_of(lock.quantization)}" for folder, lock in locks.items())
        raise ReleaseError(
            f"the adapters were trained on differently quantized weights ({told})",
            "merge --onto original with --no-fidelity: there is no live model of them together",
        )
    return next(iter(locks.values())).quantization if locks else Quantization()


def _look_at_base(lock: BaseLock | None, base: Path, allow_mismatch: str | None) -> BaseMismatch | None:
    """Before the weights are read: refuse another base, or tell of one that is allowed.

    Weights that must be the lock's are hashed while they are merged, and compared then.
    """
    if lock is None:
        return None
    weights = lock.weights if allow_mismatch is None else None
    return check_base(lock, base, weights, allow_mismatch=allow_mismatch)


def _check_weights(
    lock: BaseLock, base: Path, digests: Mapping[str, str], mismatch: BaseMismatch | None
) -> None:
    """Hold the base's weight files against the lock, or against the other base that was allowed.

    Those not in ``digests`` are hashed first.
    """
    others = {path.name: sha256_file(path) for path in weight_files(base) if path.name not in digests}
    found = {**digests, **others}
    if mismatch is None:
        check_base(lock, base, found)
    elif base_digest(found) != mismatch.digest:
        raise BaseMismatchError(f"the base in {base} changed while it was merged", "do it again")


def _draft(
    source: Release,
    onto: Onto,
    storage: Storage,
    combination: Combination | None,
    releases: Mapping[Path, Release | None],
    mismatch: BaseMismatch | None,
    rounding: Rounding | None,
) -> Manifest:
    """The new release's manifest, without its files."""
    adapter = source.manifest
    merge = Merge(
        onto=onto,
        dtype="bfloat16" if storage == "bf16" else storage,
        rounding="calibrated" if rounding else "nearest",
        base_mismatch=mismatch,
    )
    if combination is not None:
        merge = merge.model_copy(
            update={
                "weight": combination.weight,
                "others": tuple(_named(path, weight, releases[path]) for path, weight in combination.others),
                "combine": combination.combine,
                "density": combination.density,
                "seed": combination.seed,
            }
        )
    return adapter.model_copy(
        update={
            "name": name_of(adapter.name, storage),
            "created": datetime.now(UTC).replace(microsecond=0),
            "kind": "merged" if storage == "bf16" else "quantized",
            "merge": merge,
            "parent": Parent(ref=f"{adapter.name}@{adapter.version}", manifest_sha256=source.digest),
            "tools": {"adapterhub": __version__} | {name: version(name) for name in _tools(onto, storage)},
            "hardware": None,
            "files": {},
        }
    )


def _named(folder: Path, weight: float, release: Release | None) -> MergedAdapter:
    ref = f"{release.manifest.name}@{release.manifest.version}" if release else folder.resolve().name
    return MergedAdapter(
        ref=ref, weights_sha256=sha256_file(folder / "adapter_model.safetensors"), weight=weight
    )


def _tools(onto: Onto, storage: Storage) -> tuple[str, ...]:
    """What computed: LLM.int8() is a division and a rounding, and needs torch alone."""
    return ("torch", "bitsandbytes") if onto == "trained" or storage in ("nf4", "fp4") else ("torch",)
