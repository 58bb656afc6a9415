"""What layers keep for backward, moved to pinned host memory and back while the device computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

# Layers whose copies may be under way at once; their device memory is held so long.
_IN_FLIGHT = 2


@dataclass
class _Slot:
    """One layer's values: on the host, and on the device while they are needed there."""

    values: Any
    """The dataclass whose tensors were moved; its moved fields are None."""
    host: dict[str, torch.Tensor]
    device: dict[str, torch.Tensor]
    done: torch.cuda.Event
    """Recorded after the last copy in either direction."""


class Offloader:
    """Copies on a stream of its own. Memory is deterministic: a tensor's device memory is given up only after the
    compute stream has been told to wait for its copy, never by the allocator's polling.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        """``names``: the fields of the values that move; nested dataclasses are named like ``attention.out``."""
        self._names = names
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._slots: dict[int, _Slot] = {}
        self._pinned: dict[tuple[int, str], torch.Tensor] = {}
        self._leaving: list[int] = []

    def store(self, index: int, values: Any) -> None:
        """Start moving layer ``index``'s values to the host."""
        compute = torch.cuda.current_stream(self._device)
        while len(self._leaving) >= _IN_FLIGHT:
            self._release(self._leaving.pop(0), compute)
        moved = {name: tensor for name in self._names if (tensor := _get(values, name)) is not None}
        slot = _Slot(_without(values, moved), {}, moved, torch.cuda.Event())
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            for name, tensor in moved.items():
                slot.host[name] = self._pinned_like(index, name, tensor)
                slot.host[name].copy_(tensor, non_blocking=True)
            slot.done.record(self._stream)
        self._slots[index] = slot
        self._leaving.append(index)

    def fetch(self, index: int) -> Any:
        """Layer ``index``'s values on the device again; starts bringing the layer's before it."""
        self._bring(index)
        slot = self._slots.pop(index)
        torch.cuda.current_stream(self._device).wait_event(slot.done)
        if index - 1 in self._slots:
            self._bring(index - 1)
        values = slot.values
        for name, tensor in slot.device.items():
            values = _set(values, name, tensor)
        return values

    def _bring(self, index: int) -> None:
        slot = self._slots[index]
        if slot.device:
            if index in self._leaving:
                self._leaving.remove(index)  # its device memory never left
            return
        compute = torch.cuda.current_stream(self._device)
        slot.device = {name: torch.empty_like(host, device=self._device) for name, host in slot.host.items()}
        self._stream.wait_stream(compute)  # the memory just taken may still be in use there
        with torch.cuda.stream(self._stream):
            for name, tensor in slot.device.items():
                tensor.copy_(slot.host[name], non_blocking=True)
            slot.done.record(self._stream)

    def _release(self, index: int, compute: torch.cuda.Stream) -> None:
        slot = self._slots.get(index)
        if slot is not None:
            compute.wait_event(slot.done)
            slot.device = {}

    def _pinned_like(self, index: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = self._pinned.get((index, name))
        if found is None or found.numel() < tensor.numel() or found.dtype != tensor.dtype:
            found = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
            self._pinned[index, name] = found
        return found[: tensor.numel()].view(tensor.shape)


def _get(values: Any, name: str) -> torch.Tensor | None:
    for part in name.split("."):
        values = getattr(values, part, None)
    found: torch.Tensor | None = values
    return found


def _set(values: Any, name: str, tensor: torch.Tensor | None) -> Any:
    first, _, rest = name.partition(".")
    return replace(values, **{first: _set(getattr(values, first), rest, tensor) if rest else tensor})


def _without(values: Any, moved: dict[str, torch.Tensor]) -> Any:
    for name in moved:
        values = _set(values, name, None)
    return values
