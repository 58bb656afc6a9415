"""The inputs of recomputed layers, moved to pinned host memory and back while the device computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Layers whose copies to the host may be under way at once; their device memory is held so long.
IN_FLIGHT = 2


@dataclass
class _Slot:
    """One layer's input: on the host, and on the device while it is needed there."""

    host: torch.Tensor
    device: torch.Tensor | None
    done: torch.cuda.Event
    """Recorded after the last copy in either direction."""


class Offloader:
    """Copies on a stream of its own.

    Memory is deterministic: a tensor's device memory is given up only after the compute stream has been told
    to wait for its copy, never by the allocator's polling. A value is fetched one layer ahead of its use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._slots: dict[int, _Slot] = {}
        self._pinned: dict[int, torch.Tensor] = {}
        self._leaving: list[int] = []

    def store(self, index: int, value: torch.Tensor) -> None:
        """Start moving layer ``index``'s input to the host."""
        compute = torch.cuda.current_stream(self._device)
        while len(self._leaving) >= IN_FLIGHT:
            slot = self._slots[self._leaving.pop(0)]
            compute.wait_event(slot.done)
            slot.device = None
        slot = _Slot(self._pinned_like(index, value), value, torch.cuda.Event())
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            slot.host.copy_(value, non_blocking=True)
            slot.done.record(self._stream)
        self._slots[index] = slot
        self._leaving.append(index)

    def fetch(self, index: int) -> torch.Tensor:
        """Layer ``index``'s input on the device again; starts bringing the layer's before it."""
        self._bring(index)
        slot = self._slots.pop(index)
        torch.cuda.current_stream(self._device).wait_event(slot.done)
        if index - 1 in self._slots:
            self._bring(index - 1)
        assert slot.device is not None
        return slot.device

    def _bring(self, index: int) -> None:
        slot = self._slots[index]
        if slot.device is not None:
            if index in self._leaving:
                self._leaving.remove(index)  # its device memory never left
            return
        slot.device = torch.empty_like(slot.host, device=self._device)
        self._stream.wait_stream(
            torch.cuda.current_stream(self._device)
        )  # the memory taken may be in use there
        with torch.cuda.stream(self._stream):
            slot.device.copy_(slot.host, non_blocking=True)
            slot.done.record(self._stream)

    def _pinned_like(self, index: int, value: torch.Tensor) -> torch.Tensor:
        found = self._pinned.get(index)
        if found is None or found.numel() < value.numel() or found.dtype != value.dtype:
            found = torch.empty(value.numel(), dtype=value.dtype, pin_memory=True)
            self._pinned[index] = found
        return found[: value.numel()].view(value.shape)
