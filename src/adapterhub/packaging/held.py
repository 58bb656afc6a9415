"""4-bit weights held dequantized while a model is asked much, where they would be unpacked every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SHARE = 0.5  # of the memory that is free now


@contextmanager
def weights_held(model: torch.nn.Module) -> Iterator[int]:
    """Within the block, 4-bit layers of ``model`` that compute in float32 on the CPU keep weights unpacked.

    bitsandbytes dequantizes a layer's weight at each product there, also for the one token a step of
    generating. The products are of the same numbers, (out, in) float32, as without.
    Layers are held in order while they fit into half of the memory that is free; others, and those on other
    devices, are left alone. Yields how many are held. Not for training: gradients stop at such a layer's
    weight, and its dequantized copy is not the one that training uses.
    """
    from bitsandbytes.nn import Linear4bit

    room = _free_memory() * _SHARE
    held = []
    try:
        for module in model.modules():
            if not isinstance(module, Linear4bit) or not _unpacks_each_time(module):
                continue
            room -= 4 * module.in_features * module.out_features
            if room < 0:
                break
            module.forward = _with_weight(module)
            held.append(module)
        yield len(held)
    finally:
        for module in held:
            del module.forward


def _unpacks_each_time(module: Any) -> bool:
    import torch

    state = module.weight.quant_state
    return module.weight.device.type == "cpu" and module.compute_dtype == torch.float32 and state is not None


def _with_weight(module: Any) -> Any:
    """``module``'s forward, on a weight that was dequantized once."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    state = copy(module.weight.quant_state)
    state.dtype = torch.float32  # as bitsandbytes unpacks it where no gradient is wanted
    weight = dequantize_4bit(module.weight.data, state)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.float(), weight, module.bias).to(x.dtype)

    return forward


def _free_memory() -> int:
    """Bytes of memory that are free; 0 where the system does not tell."""
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_AVPHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
