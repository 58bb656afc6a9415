"""A base in the precision that it is loaded in: its weights as a loaded model computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import Adapter
from adapterhub.packaging.checkpoint import Checkpoint, open_checkpoint
from adapterhub.packaging.manifest import Quantization
from adapterhub.packaging.quantized import quantized_names, through_4bit_
from adapterhub.packaging.tensors import TensorEntry, TensorFile, read_bytes, read_tensor
from adapterhub.packaging.updates import some

if TYPE_CHECKING:
    import torch

_RAW = {"U8": "uint8", "I8": "int8", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WRONG = "name another version of the base that the adapter was trained on"


@dataclass(frozen=True)
class Variant:
    """One version of a base."""

    checkpoint: Checkpoint
    quantization: Quantization | None
    """What its linear layers are held in when it runs; None: 16 bits."""
    stored: bool
    """Whether the checkpoint's files are quantized already."""

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    def weight(self, module: str) -> torch.Tensor:
        """The weight of a linear layer as a loaded model computes with it, (out, in) float32."""
        import torch

        name = f"{module}.weight"
        shard, entry = self._find(name)
        if self.stored and entry.dtype in ("U8", "I8"):
            return _decode(self, name).to(torch.float32)
        weight = read_tensor(shard, entry).to(torch.bfloat16)
        if self.quantization is not None and name in self._quantized:
            if self.quantization.type == "int8":
                return _through_int8(weight)
            weight = through_4bit_(weight.contiguous(), self.quantization)
        return weight.to(torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint in its own dtype, integers too."""
        import torch

        shard, entry = self._find(name)
        data = torch.frombuffer(
            read_bytes(shard, entry.offset, entry.size), dtype=getattr(torch, _RAW[entry.dtype])
        )
        return data.view(entry.shape)

    @cached_property
    def _quantized(self) -> set[str]:
        return quantized_names(self.checkpoint.config, self.checkpoint.tensors.values())

    def _find(self, name: str) -> tuple[TensorFile, TensorEntry]:
        entry = self.checkpoint.tensors[name]
        return next(shard for shard in self.checkpoint.shards if entry in shard.entries), entry

    def check_holds(self, adapter: Adapter) -> None:
        """Raise ReleaseError unless each layer that ``adapter`` changes is here, in its shape."""
        missing = [module for module in adapter.pairs if f"{module}.weight" not in self.checkpoint.tensors]
        if missing:
            raise ReleaseError(
                f"{self.folder} has no layer {some(missing)}, which the adapter changes", _WRONG
            )
        for module, pair in adapter.pairs.items():
            shape = (pair.out_features, pair.in_features)
            entry = self.checkpoint.tensors[f"{module}.weight"]
            stored = entry.dtype == "U8"
            if not stored and entry.shape != shape:
                raise ReleaseError(
                    f"{module!r} is {list(entry.shape)} in {self.folder}, and {list(shape)} to the adapter",
                    _WRONG,
                )


def open_variant(folder: Path, quantization: Quantization | None) -> Variant:
    """The base in ``folder``, loaded in ``quantization``.

    A folder whose files are quantized already (as ``save_pretrained`` of a 4-bit model writes them) says by
    itself how, and ``quantization`` is left out of account. Raises ReleaseError for a folder that is no
    checkpoint, and for what bitsandbytes did not quantize.
    """
    checkpoint = open_checkpoint(folder, quantized=True)
    settings = checkpoint.config.get("quantization_config")
    if not settings:
        return Variant(checkpoint, quantization, stored=False)
    return Variant(checkpoint, _read_settings(checkpoint, settings), stored=True)


def _read_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Quantization:
    if settings.get("quant_method", "bitsandbytes") != "bitsandbytes":
        raise ReleaseError(
            f"{checkpoint.folder} was quantized by {settings['quant_method']!r}",
            "name a base in 16 bits, or one that bitsandbytes quantized",
        )
    if settings.get("load_in_8bit"):
        return Quantization(type="int8", double=False)
    state = next((name for name in checkpoint.tensors if ".quant_state.bitsandbytes__" in name), None)
    if state is None:
        raise ReleaseError(
            f"{checkpoint.folder} says that it is quantized, and holds no quantized weight",
            "take it from its source again",
        )
    variant = Variant(checkpoint, None, stored=True)
    stated = _quant_state(variant, state.partition(".quant_state.")[0])
    return Quantization(
        type=stated.quant_type,
        double=bool(stated.nested),
        block_size=int(stated.blocksize),
        compute_dtype=settings.get("bnb_4bit_compute_dtype", "float32"),
    )


def _quant_state(variant: Variant, name: str) -> Any:
    """bitsandbytes' description of the 4-bit weight ``name``. Raises ReleaseError when it is malformed."""
    from bitsandbytes.functional import QuantState

    parts = {key: variant.read(key) for key in variant.checkpoint.tensors if key.startswith(f"{name}.")}
    try:
        return QuantState.from_dict(parts, device="cpu")
    except (KeyError, ValueError, TypeError) as err:
        raise ReleaseError(
            f"{variant.folder}: the 4-bit weight {name!r} is damaged: {err}", "take it from its source again"
        ) from err


def _decode(variant: Variant, name: str) -> torch.Tensor:
    """A weight that is stored quantized."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    if variant.checkpoint.tensors[name].dtype == "I8":
        scales = variant.read(name.removesuffix("weight") + "SCB")
        return variant.read(name).to(torch.float32) * (scales / 127).unsqueeze(1)
    weight: torch.Tensor = dequantize_4bit(variant.read(name), _quant_state(variant, name))
    return weight


def _through_int8(weight: torch.Tensor) -> torch.Tensor:
    """The weight as LLM.int8() holds it; outliers of the inputs, which it computes in 16 bits, left aside."""
    import torch

    rows = weight.to(torch.float32)
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.round(rows * (127 / largest)) * (largest / 127)
