"""All adapter weights in one buffer, so that one launch steps, clips or clears them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Elements copied from the host at once.
_COPIED = 64 * 2**20


@dataclass(frozen=True)
class FlatAdapters:
    """Weights, compute copies and gradients of every adapter, each kind in one buffer of n elements."""

    master: torch.nn.Parameter
    """float32 (n), on the device or, paged, in pinned host memory. The adapter modules' parameters are views
    of it.
    """
    compute: torch.Tensor
    """(n) in the compute dtype, on the device: what products use."""
    gradient: torch.Tensor
    """float32 (n), on the device: backward adds to it, the optimizer's step clears it."""
    parameters: tuple[torch.nn.Parameter, ...]
    """The adapter modules', in the order of the buffer."""
    views: dict[int, slice]
    """By ``id`` of each of them: its place."""

    @property
    def moved(self) -> bool:
        """Whether somebody gave the adapter modules other memory, as ``Module.to`` does."""
        return any(
            parameter.untyped_storage().data_ptr() != self.master.untyped_storage().data_ptr()
            for parameter in (self.parameters[0], self.parameters[-1])
        )

    @property
    def paged(self) -> bool:
        """Whether the float32 weights lie in host memory while a GPU computes."""
        return self.master.device != self.gradient.device

    def compute_view(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The compute copy of one module's parameter, in its shape."""
        return self.compute[self.views[id(parameter)]].view(parameter.shape)

    def gradient_view(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The gradient of one module's parameter, in its shape."""
        return self.gradient[self.views[id(parameter)]].view(parameter.shape)

    def refresh(self) -> None:
        """Copy the weights to the compute copies; after a step, and after weights were loaded."""
        with torch.no_grad():
            for start in range(
                0, self.master.numel(), _COPIED
            ):  # a paged copy needs its float32 on the device
                rows = slice(start, start + _COPIED)
                self.compute[rows].copy_(self.master[rows].to(self.compute.device, non_blocking=True))


def flatten(
    parameters: Sequence[torch.nn.Parameter], dtype: torch.dtype, device: torch.device, *, paged: bool
) -> FlatAdapters:
    """Move ``parameters`` into one buffer, in order; they become views of it, values unchanged.

    ``paged``: the float32 weights lie in pinned host memory. Each parameter begins at a multiple of 8
    elements, so that its compute copy is aligned to 16 bytes.
    """
    views, at = {}, 0
    for parameter in parameters:
        views[id(parameter)] = slice(at, at + parameter.numel())
        at += parameter.numel() + -parameter.numel() % 8
    if paged:
        buffer = torch.zeros(at, dtype=torch.float32, pin_memory=True)
    else:
        buffer = torch.zeros(at, dtype=torch.float32, device=device)
    with torch.no_grad():
        for parameter in parameters:
            place = buffer[views[id(parameter)]].view(parameter.shape)
            place.copy_(parameter)
            parameter.data = place
    flat = FlatAdapters(
        master=torch.nn.Parameter(buffer),
        compute=torch.empty(at, dtype=dtype, device=device),
        gradient=torch.zeros(at, dtype=torch.float32, device=device),
        parameters=tuple(parameters),
        views=views,
    )
    flat.refresh()
    return flat
