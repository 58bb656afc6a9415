"""Storing a merged release otherwise: quantized, streamed from its 16-bit shards."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from adapterhub.errors import ReleaseError, SignatureError
from adapterhub.packaging.calibration.calibrate import CalibrationText, Rounding, add_rounding, note_text
from adapterhub.packaging.checkpoint import open_checkpoint
from adapterhub.packaging.evidence import RoundingEvidence
from adapterhub.packaging.layout import Storage
from adapterhub.packaging.manifest import Manifest, Merge, Parent
from adapterhub.packaging.release import Release
from adapterhub.packaging.shards import Progress
from adapterhub.packaging.sums import plan_sums
from adapterhub.packaging.writing import SUFFIXES, Examine, name_of, write_checkpoint
from adapterhub.version import __version__


@dataclass(frozen=True)
class RequantizeReport:
    """What re-quantizing made."""

    release: Release
    storage: Storage
    tensors: int
    """All tensors of the source."""
    quantized: int
    """Those that are stored quantized."""
    size: int
    """Bytes of the new tensors."""
    resumed: int
    """Shards that an earlier run had finished before it was cut off."""
    seconds: float
    rounding: RoundingEvidence | None
    """What choosing 4-bit codes on text gained; None for rounding to nearest."""


def requantize_release(
    source: Release,
    out: Path,
    *,
    storage: Storage,
    calibration: CalibrationText | None = None,
    examine: Examine | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = lambda _done, _all: None,
) -> RequantizeReport:
    """Store the linear layers of the merged release ``source`` in ``storage``: a release in ``out``.

    Streams and goes on where it was cut off, as a merge does; for the arguments see ``merge_adapter``.
    Raises ReleaseError for a release of another kind, or when ``out`` exists; SignatureError for a file that
    is not what the manifest lists; OSError for a full disk: nothing is left behind then.
    """
    started = time.monotonic()
    manifest = source.manifest
    if manifest.kind != "merged" or manifest.merge is None:
        raise ReleaseError(
            f"{source.path} is of kind {manifest.kind!r}",
            "name a release that `adapterhub merge --to bf16` made; merge an adapter with `adapterhub merge`",
        )
    checkpoint = open_checkpoint(source.path)
    shards = {shard.path.name for shard in checkpoint.shards}
    source.check_files(name for name in manifest.files if name not in shards)
    plan = plan_sums(None, checkpoint, None, storage, device)
    rounding = Rounding(checkpoint, plan, calibration) if calibration else None

    def check_shards(digests: Mapping[str, str]) -> None:
        listed = {name: entry.sha256 for name, entry in manifest.files.items()}
        changed = [name for name, digest in digests.items() if listed.get(name) != digest]
        if changed:
            raise SignatureError(
                f"{source.path / changed[0]} is not the file that the manifest lists",
                "it was changed or damaged: take the release from its source again",
            )

    written = write_checkpoint(
        checkpoint,
        replace(plan, chosen=rounding.load) if rounding else plan,
        out,
        inputs={"source": source.digest, "settings": [storage, device]} | note_text(calibration),
        tokenizer=source.path,
        draft=_draft(source, manifest.merge, storage, rounding),
        check_sources=check_shards,
        prepare=rounding.choose if rounding else None,
        examine=add_rounding(rounding, examine),
        threads=threads,
        progress=progress,
    )
    return RequantizeReport(
        release=Release.open(out),
        storage=storage,
        tensors=len(checkpoint.tensors),
        quantized=len(plan.layout.quantized),
        size=written.size,
        resumed=written.resumed,
        seconds=time.monotonic() - started,
        rounding=rounding.evidence() if rounding else None,
    )


def _draft(source: Release, merge: Merge, storage: Storage, rounding: Rounding | None) -> Manifest:
    """The new release's manifest, without its files."""
    merged = source.manifest
    settings = {"dtype": storage, "rounding": "calibrated" if rounding else "nearest"}
    tools = ("torch",) if storage == "int8" else ("torch", "bitsandbytes")
    return merged.model_copy(
        update={
            "name": name_of(merged.name.removesuffix(SUFFIXES["bf16"]), storage),
            "created": datetime.now(UTC).replace(microsecond=0),
            "kind": "quantized",
            "merge": merge.model_copy(update=settings),
            "parent": Parent(ref=f"{merged.name}@{merged.version}", manifest_sha256=source.digest),
            "tools": {"adapterhub": __version__} | {name: version(name) for name in tools},
            "hardware": None,
            "files": {},
        }
    )
