"""A GGUF file, written whole or not at all, one tensor in memory at a time."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapterhub.errors import AdapterHubError, ReleaseError
from adapterhub.packaging.files import MANIFEST_NAME, fsync_folder
from adapterhub.packaging.release import Release
from adapterhub.version import __version__

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

Form = Literal["f32", "f16", "bf16", "q8_0"]
"""How llama.cpp stores a matrix: floats, or 8-bit codes with a float16 scale for 32 of them."""
Progress = Callable[[int, int], None]
"""Told the bytes that are done, and all of them."""

_Q8_BLOCK, _Q8_BYTES = 32, 34
_ITEMS = 1 << 22  # converted at a time


@dataclass(frozen=True)
class Planned:
    """One tensor of the new file."""

    name: str
    """llama.cpp's."""
    shape: tuple[int, ...]
    """As torch has it, the rows first; the file lists it the other way round."""
    form: Form
    load: Callable[[], torch.Tensor]
    """Reads it, any float dtype."""

    @property
    def size(self) -> int:
        """Bytes."""
        numbers = math.prod(self.shape)
        if self.form == "q8_0":
            return numbers // _Q8_BLOCK * _Q8_BYTES
        return numbers * (4 if self.form == "f32" else 2)


def form_of(shape: Sequence[int], wanted: Form) -> Form:
    """What a tensor of ``shape`` is stored as where ``wanted`` was asked for, by llama.cpp's own rules.

    Vectors stay float32; rows that no whole number of 8-bit blocks fills are float16.
    """
    if len(shape) < 2:
        return "f32"
    return "f16" if wanted == "q8_0" and shape[-1] % _Q8_BLOCK else wanted


def check_file(out: Path) -> None:
    """Raise ReleaseError unless a new file can be made at ``out``."""
    if out.exists():
        kind = "is a folder" if out.is_dir() else "exists already"
        raise ReleaseError(f"{out} {kind}", "choose another --out: a file that is not there yet")
    for above in out.absolute().parents:
        if (above / MANIFEST_NAME).is_file():
            raise ReleaseError(f"{out} lies inside the release {above}", "choose an --out beside it")
    if not out.absolute().parent.is_dir():
        raise ReleaseError(f"{out.absolute().parent}: no such folder", "make it, or choose another --out")


def write_container(
    out: Path,
    architecture: str,
    describe: Callable[[GGUFWriter], None],
    tensors: Sequence[Planned],
    progress: Progress,
) -> int:
    """Write ``tensors`` with the metadata that ``describe`` adds to ``out``; returns the file's bytes.

    Raises ReleaseError for a value that the form has no number for; OSError for a full disk. ``out`` is not
    there then.
    """
    gguf_writer = _import_gguf()
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.absolute().parent)
    os.close(handle)
    writer = gguf_writer(name, architecture)
    try:
        describe(writer)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, _dtype_of(tensor.form), tensor.size, _ggml_type(tensor.form)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(tensor.size for tensor in tensors)
        for tensor in tensors:
            writer.write_tensor_data(_convert(tensor))
            done += tensor.size
            progress(done, total)
        writer.close()
        Path(name).chmod(0o644)
        with Path(name).open("rb") as file:
            os.fsync(file.fileno())
        Path(name).replace(out)
    except BaseException:
        writer.close()
        Path(name).unlink(missing_ok=True)
        raise
    fsync_folder(out.absolute().parent)
    return out.stat().st_size


def describe_release(writer: GGUFWriter, release: Release | None, name: str) -> None:
    """Write who this is, and which release it was made from: the manifest's digest stands for all of it."""
    manifest = release.manifest if release else None
    writer.add_name(manifest.name if manifest else name)
    writer.add_string("adapterhub.version", __version__)
    if release is None or manifest is None:
        return
    writer.add_version(manifest.version)
    if manifest.licence:
        writer.add_license(manifest.licence)
    if manifest.task:
        writer.add_description(manifest.task)
    writer.add_string("adapterhub.release.manifest_sha256", release.digest)
    if manifest.base is not None:
        writer.add_string("adapterhub.base.name", manifest.base.name)
        writer.add_string("adapterhub.base.digest", manifest.base.digest)


def _import_gguf() -> type[GGUFWriter]:
    try:
        from gguf import GGUFWriter
    except ImportError as err:
        raise AdapterHubError(
            "writing GGUF needs the package gguf", "pip install 'adapterhub[gguf]'"
        ) from err
    logging.getLogger("gguf").setLevel(logging.ERROR)  # it tells each file's endianness
    return GGUFWriter


def _dtype_of(form: Form) -> np.dtype:
    import numpy as np

    return np.dtype({"f32": "float32", "f16": "float16"}.get(form, "uint16"))


def _ggml_type(form: Form) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[form.upper()]


def _convert(tensor: Planned) -> np.ndarray:
    """The tensor's bytes in its form, a few rows at a time."""
    import numpy as np

    whole = tensor.load()
    rows = whole.reshape(-1, whole.shape[-1]) if whole.ndim > 1 else whole.reshape(1, -1)
    made = np.empty((rows.shape[0], tensor.size // max(1, rows.shape[0])), np.uint8)
    step = max(1, _ITEMS // max(1, rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step]
        made[first : first + step] = _encode(tensor, part)
    return made


def _encode(tensor: Planned, part: torch.Tensor) -> np.ndarray:
    """Rows as bytes, uint8 (rows, bytes of a row)."""
    import torch

    if not torch.isfinite(part).all():
        raise ReleaseError(f"{tensor.name!r} holds NaN or infinite values", "train the adapter again")
    if tensor.form == "q8_0":
        from gguf.quants import quantize

        encoded: np.ndarray = quantize(part.float().numpy(), _ggml_type("q8_0"))
        return encoded
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[tensor.form]
    stored = part.to(dtype).contiguous()
    if not torch.isfinite(stored).all():
        raise ReleaseError(
            f"{tensor.name!r} holds values beyond what float16 has", "export it with --type bf16"
        )
    return stored.view(torch.uint8).numpy()
