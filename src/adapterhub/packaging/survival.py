"""Delta survival: the share of an adapter's update that a merged model still holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adapterhub.errors import AdapterHubError, ReleaseError
from adapterhub.packaging.adapter import Adapter
from adapterhub.packaging.checkpoint import Checkpoint
from adapterhub.packaging.sums import plan_sums
from adapterhub.packaging.tensors import read_tensor
from adapterhub.packaging.unwrapping import unwrap

if TYPE_CHECKING:
    import torch

Weights = Callable[[str], "torch.Tensor"]
"""From a linear layer's name to its weight, (out, in) float32."""


def measure_survival(adapter: Adapter, before: Weights, after: Weights) -> float:
    """Σ⟨W′ − W, s·B·A⟩ / Σ‖s·B·A‖² over the adapted layers, W ``before`` the merge and W′ ``after``.

    It is 1 when the whole update is there and 0 when none of it is; sums in float64. Raises ReleaseError
    when the update is zero.
    """
    kept = whole = 0.0
    for module, pair in adapter.pairs.items():
        a, b = adapter.load_pair(module)
        update = (b @ a) * pair.scale
        kept += float(((after(module) - before(module)) * update).double().sum())
        whole += float(update.double().square().sum())
    if whole == 0:
        raise ReleaseError(f"the adapter in {adapter.folder} changes nothing: B·A is zero", "train it first")
    return kept / whole


def weights_in(model: Any) -> Weights:
    """The weights of a loaded model, dequantized; an adapter on it is left out.

    To be read before the first forward: on the CPU bitsandbytes then repacks 4-bit codes for its own kernel,
    and what is read raises AdapterHubError.
    """
    import bitsandbytes
    import torch
    from transformers.pytorch_utils import Conv1D

    plain = unwrap(model)

    def read(module: str) -> torch.Tensor:
        layer = plain.get_submodule(module)
        layer = getattr(layer, "base_layer", layer)
        weight = layer.weight
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                raise AdapterHubError(
                    f"{module!r} was repacked by a forward pass: its codes are none of {weight.quant_type}'s",
                    "load the model again, and read its weights before it computes anything",
                )
            dense = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            # The scale of a row is its largest value, which stands for 127.
            dense = weight.data.float() * (weight.SCB / 127).unsqueeze(1)
        else:
            dense = weight.data.T if isinstance(layer, Conv1D) else weight.data
        return dense.to("cpu", torch.float32)

    return read


def weights_of(checkpoint: Checkpoint, adapter: Adapter) -> Weights:
    """The weights of a checkpoint folder that the adapter's factors belong to.

    Raises ReleaseError when a factor matches nothing in it.
    """
    import torch

    updates = plan_sums(adapter, checkpoint, None).updates.by_name
    files = {entry.name: (shard, entry) for shard in checkpoint.shards for entry in shard.entries}
    places = {
        update.pair.module: (update.origin or files[name], update.pair.transposed)
        for name, update in updates.items()
        if update.pair is not None
    }

    def read(module: str) -> torch.Tensor:
        place, transposed = places[module]
        weight = read_tensor(*place).to(torch.float32)
        return weight.T if transposed else weight

    return read
