"""A checkpoint as GGUF: weights, configuration and tokenizer in the one file that llama.cpp runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapterhub.errors import ReleaseError
from adapterhub.packaging.checkpoint import Checkpoint, open_checkpoint
from adapterhub.packaging.export.architecture import Architecture, read_architecture
from adapterhub.packaging.export.container import (
    Form,
    Planned,
    Progress,
    check_file,
    describe_release,
    form_of,
    write_container,
)
from adapterhub.packaging.export.vocabulary import read_vocabulary
from adapterhub.packaging.manifest import MANIFEST_NAME
from adapterhub.packaging.release import Release
from adapterhub.packaging.tensors import FLOATS, TensorEntry, TensorFile, read_tensor
from adapterhub.packaging.verification import check_release

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


@dataclass(frozen=True)
class Export:
    """What an export made."""

    out: Path
    kind: Literal["model", "adapter"]
    architecture: str
    """llama.cpp's name for it."""
    form: Form
    """What the matrices are stored as."""
    tensors: int
    size: int
    """Bytes of the file."""
    context: int
    """Tokens up to which llama.cpp computes what transformers does."""
    slides: bool
    """Whether that is a sliding window, which llama.cpp has not for these."""
    release: Release | None


def export_model(
    folder: Path, out: Path, form: Form = "f16", progress: Progress = lambda _done, _all: None
) -> Export:
    """Write the merged release or plain 16-bit checkpoint in ``folder`` to ``out``, a GGUF file.

    Matrices are stored as ``form``; vectors in float32, as llama.cpp wants them. A release's files are
    checked first. Raises ReleaseError for what llama.cpp has no word for, for a quantized checkpoint, and
    where ``out`` exists; SignatureError for a changed file; AdapterHubError without the package gguf.
    """
    check_file(out)
    release = Release.open(folder) if (folder / MANIFEST_NAME).is_file() else None
    if release is not None:
        if release.manifest.kind != "merged":
            raise ReleaseError(
                f"{folder} is of kind {release.manifest.kind!r}",
                "export the adapter's own release, or what `adapterhub merge --to bf16` makes of it",
            )
        release = check_release(folder).release
    checkpoint = open_checkpoint(folder)
    architecture = read_architecture(folder, checkpoint.config)
    planned = _plan(checkpoint, architecture, form)
    vocabulary = read_vocabulary(folder, checkpoint.config["vocab_size"])

    def describe(writer: GGUFWriter) -> None:
        from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

        writer.add_type(GGUFType.MODEL)
        describe_release(writer, release, folder.resolve().name)
        writer.add_file_type(LlamaFileType[_FILE_TYPES[form]])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        architecture.describe(writer)
        vocabulary.describe(writer)

    size = write_container(out, architecture.name, describe, planned, progress)
    return Export(
        out=out,
        kind="model",
        architecture=architecture.name,
        form=form,
        tensors=len(planned),
        size=size,
        context=architecture.context,
        slides=architecture.slides,
        release=release,
    )


def _plan(checkpoint: Checkpoint, architecture: Architecture, form: Form) -> list[Planned]:
    planned = []
    factors = architecture.rope_factors()
    if factors is not None:
        planned.append(Planned("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors))
    for shard in checkpoint.shards:
        for entry in shard.entries:
            name = architecture.tensor_name(entry.name)
            if name is None:
                continue
            if entry.dtype not in FLOATS:
                raise ReleaseError(
                    f"{shard.path}: {entry.name!r} is {entry.dtype}", "name a checkpoint in 16-bit weights"
                )
            load = partial(_load, architecture, shard, entry)
            planned.append(Planned(name, entry.shape, form_of(entry.shape, form), load))
    _check_complete(checkpoint, planned)
    return planned


def _load(architecture: Architecture, shard: TensorFile, entry: TensorEntry) -> torch.Tensor:
    return architecture.order_rows(entry.name, read_tensor(shard, entry))


def _check_complete(checkpoint: Checkpoint, planned: list[Planned]) -> None:
    """Refuse a checkpoint that lacks a layer: llama.cpp would say so only when it is loaded."""
    names = {tensor.name for tensor in planned}
    layers = range(checkpoint.config["num_hidden_layers"])
    wanted: list[Callable[[int], str]] = [
        lambda layer: f"blk.{layer}.attn_q.weight", lambda layer: f"blk.{layer}.ffn_down.weight",
    ]  # fmt: skip
    needed = [
        "token_embd.weight",
        "output_norm.weight",
        *(name(layer) for layer in layers for name in wanted),
    ]
    missing = [name for name in needed if name not in names]
    if missing:
        raise ReleaseError(
            f"{checkpoint.folder} holds nothing for llama.cpp's {missing[0]!r}",
            "name the folder of a complete transformers checkpoint",
        )
