"""An adapter as a GGUF LoRA, which llama.cpp puts on any GGUF of its base."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import Adapter, LoraPair, read_adapter
from adapterhub.packaging.base import check_config
from adapterhub.packaging.checkpoint import open_checkpoint
from adapterhub.packaging.export.architecture import Architecture, read_architecture
from adapterhub.packaging.export.container import (
    Form,
    Planned,
    Progress,
    check_file,
    describe_release,
    write_container,
)
from adapterhub.packaging.export.model import Export
from adapterhub.packaging.manifest import MANIFEST_NAME
from adapterhub.packaging.updates import match_updates, some
from adapterhub.packaging.verification import check_release

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

_MERGE = "merge it (adapterhub merge --to bf16), and export the merged release"


def export_adapter(
    folder: Path,
    base: Path,
    out: Path,
    form: Literal["f32", "f16"] = "f32",
    progress: Progress = lambda _done, _all: None,
) -> Export:
    """Write the adapter in ``folder``, a release or a plain PEFT folder, to ``out``, a GGUF LoRA.

    ``base`` is the folder of its 16-bit base: every factor must match a weight of it. llama.cpp knows one
    alpha and scales by alpha/rank; where a module's own scale is another one, B takes the difference. Raises
    ReleaseError for what a GGUF LoRA cannot hold (DoRA, biases, saved modules, embeddings) and for what
    matches nothing; BaseMismatchError for another base's configuration; SignatureError for a changed file;
    AdapterHubError without the package gguf.
    """
    check_file(out)
    release = check_release(folder).release if (folder / MANIFEST_NAME).is_file() else None
    if release is not None and release.manifest.base is not None:
        check_config(release.manifest.base, base)
    adapter = read_adapter(folder)
    checkpoint = open_checkpoint(base)
    architecture = read_architecture(base, checkpoint.config)
    _check_holdable(adapter)
    names = {
        name: update.pair
        for name, update in match_updates(adapter, checkpoint).by_name.items()
        if update.pair
    }
    alpha = adapter.config.lora_alpha or 1.0  # llama.cpp takes 0 for no scaling at all
    planned = []
    for name, pair in names.items():
        assert isinstance(pair, LoraPair)
        planned += _plan(adapter, architecture, name, pair, alpha, form)

    def describe(writer: GGUFWriter) -> None:
        from gguf import GGUFType

        writer.add_type(GGUFType.ADAPTER)
        describe_release(writer, release, folder.resolve().name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)

    size = write_container(out, architecture.name, describe, planned, progress)
    return Export(
        out=out,
        kind="adapter",
        architecture=architecture.name,
        form=form,
        tensors=len(planned),
        size=size,
        context=architecture.context,
        slides=architecture.slides,
        release=release,
    )


def _check_holdable(adapter: Adapter) -> None:
    parts: dict[str, Iterable[str]] = {
        "DoRA's lengths": adapter.magnitudes,
        "rows of embeddings trained whole": adapter.tokens,
        "factors on embeddings": adapter.embeddings,
        "weights saved whole": adapter.whole,
    }
    held = [f"{words} ({some(found)})" for words, found in parts.items() if found]
    if held:
        raise ReleaseError(
            f"{adapter.folder} holds {', '.join(held)}, which a GGUF LoRA has no place for", _MERGE
        )


def _plan(
    adapter: Adapter, architecture: Architecture, name: str, pair: LoraPair, alpha: float, form: Form
) -> list[Planned]:
    """The two factors of one module."""
    target = architecture.tensor_name(name)
    if target is None:
        raise ReleaseError(
            f"{adapter.folder} adapts {name!r}, which the base ties to its embeddings and a GGUF LoRA cannot",
            _MERGE,
        )
    load_b = partial(_load_b, adapter, architecture, name, pair, alpha)
    return [
        Planned(f"{target}.lora_a", pair.a.shape, form, partial(adapter.load, pair.a)),
        Planned(f"{target}.lora_b", pair.b.shape, form, load_b),
    ]


def _load_b(
    adapter: Adapter, architecture: Architecture, name: str, pair: LoraPair, alpha: float
) -> torch.Tensor:
    b = architecture.order_rows(name, adapter.load(pair.b))
    factor = pair.scale * pair.rank / alpha
    return b if factor == 1 else b * factor
