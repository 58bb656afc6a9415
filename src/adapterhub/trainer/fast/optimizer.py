"""AdamW over the flat adapter buffer: one launch a step on the device, or chunk by chunk when the state is
paged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from adapterhub.trainer.fast.flat import FlatAdapters
from adapterhub.trainer.ledger import PAGED_CHUNK

_BLOCK = 256  # weights that share a scale in bitsandbytes' 8-bit optimizers


class FlatAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) over ``FlatAdapters``, with clipping by norm in the step.

    The norm and the clipping factor stay on the device: a step causes no device-to-host transfer. After the
    step the compute copies are refreshed and the gradient is cleared. ``grad_norm`` holds the norm before
    clipping, ().

    With ``bits`` 8 the moments are kept in 8 bits by blocks of 256 (Dettmers et al. 2022, bitsandbytes). When
    the master weights are paged (QLoRA section 3), so are the moments: they pass through the device chunk by
    chunk, two at once, and the step ends with the host waiting for the last copy.
    """

    def __init__(
        self,
        flat: FlatAdapters,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        bits: Literal[8, 32] = 32,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([flat.master], defaults)
        self.flat = flat
        self.bits = bits
        self.max_grad_norm = max_grad_norm
        self.grad_norm = torch.zeros((), device=flat.gradient.device)
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._streams = [torch.cuda.Stream(flat.gradient.device) for _ in range(2)] if flat.paged else []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradient buffer (a step does so by itself)."""
        self.flat.gradient.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. A gradient that is not finite shows in ``grad_norm``; whoever reads it decides."""
        if closure is not None:
            raise NotImplementedError("FlatAdamW takes no closure")
        gradient = self.flat.gradient
        self.grad_norm = torch.linalg.vector_norm(gradient)
        if self.max_grad_norm is not None:
            gradient.mul_((self.max_grad_norm / (self.grad_norm + 1e-6)).clamp_(max=1.0))
        state = self._initialized()
        state["step"] += 1
        if self.flat.paged:
            self._step_paged(state)
        else:
            self._update(self.flat.master, gradient, state)
            self.flat.refresh()
        gradient.zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; 8-bit moments stay 8-bit and paged state stays on the host."""
        super().load_state_dict(state_dict)
        state = self.state[self.flat.master]
        if state:
            state["step"] = state["step"].cpu()  # read on the host at every step
        for name, value in state.items():
            if name in ("exp_avg", "exp_avg_sq") and self.bits == 8:
                value = value.to(torch.uint8)
            state[name] = value.pin_memory() if self.flat.paged and name != "step" else value

    def moments(self) -> dict[int, dict[str, torch.Tensor]]:
        """By ``id`` of an adapter module's parameter its state as views: ``step`` (), and in the parameter's
        shape ``exp_avg`` and ``exp_avg_sq``. Empty before the first step; for 32 bits.
        """
        state: dict[str, torch.Tensor] = self.state[self.flat.master]
        if not state:
            return {}
        return {
            id(parameter): {
                "step": state["step"],
                **{name: self._view(state[name], parameter) for name in ("exp_avg", "exp_avg_sq")},
            }
            for parameter in self.flat.parameters
        }

    @torch.no_grad()
    def load_moments(self, moments: dict[int, dict[str, Any]]) -> None:
        """Take over what ``moments`` of this or another optimizer gave, from any device; 32 bits."""
        state = self._initialized()
        for parameter in self.flat.parameters:
            for name in ("exp_avg", "exp_avg_sq"):
                self._view(state[name], parameter).copy_(moments[id(parameter)][name])
        state["step"] = torch.tensor(float(max(int(found["step"]) for found in moments.values())))

    def _view(self, buffer: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        return buffer[self.flat.views[id(parameter)]].view(parameter.shape)

    def _step_paged(self, state: dict[str, torch.Tensor]) -> None:
        """Master weights and moments through the device, chunk by chunk, on two streams in turn."""
        device = self.flat.gradient.device
        compute = torch.cuda.current_stream(device)
        for stream in self._streams:
            stream.wait_stream(compute)
        moments = [name for name in state if name != "step"]
        for index, rows in enumerate(_chunks(self.flat.gradient.numel())):
            with torch.cuda.stream(self._streams[index % 2]):
                here = {name: _part(state, name, rows).to(device, non_blocking=True) for name in moments}
                weights = self.flat.master[rows].to(device, non_blocking=True)
                self._update(weights, self.flat.gradient[rows], {**here, "step": state["step"]})
                self.flat.compute[rows].copy_(weights)
                self.flat.master[rows].copy_(weights, non_blocking=True)
                for name in moments:
                    _part(state, name, rows).copy_(here[name], non_blocking=True)
        for stream in self._streams:
            compute.wait_stream(stream)
            stream.synchronize()  # whoever reads the host's weights next must see this step's

    def _update(self, weights: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """One AdamW step on tensors of the device, in place."""
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        step = int(state["step"])  # on the host: no transfer
        if self.bits == 8:
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                "adam", gradient, weights, state["exp_avg"], state["exp_avg_sq"], beta1, beta2, 0.0, 0.0,
                group["eps"], step, float(group["lr"]), *self._maps(weights.device), state["scale"],
                state["scale_sq"], group["weight_decay"], 1.0, False,
            )  # fmt: skip
            return
        on_device = torch.full((), float(step), device=weights.device)
        torch._fused_adamw_(
            [weights], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [on_device],
            lr=float(group["lr"]), beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip

    def _initialized(self) -> dict[str, torch.Tensor]:
        """The state, made at the first step: moments of n elements, on the host when paged."""
        state: dict[str, torch.Tensor] = self.state[self.flat.master]
        if state:
            return state
        count = self.flat.master.numel()
        state["step"] = torch.zeros(())
        dtype = torch.uint8 if self.bits == 8 else torch.float32
        state["exp_avg"], state["exp_avg_sq"] = self._zeros(count, dtype), self._zeros(count, dtype)
        if self.bits == 8:
            # bitsandbytes' maps hold 0 at these codes: the first for signed values, the second for squares.
            first, second = (int((table == 0).nonzero()[0]) for table in self._maps(torch.device("cpu")))
            state["exp_avg"].fill_(first)
            state["exp_avg_sq"].fill_(second)
            blocks = -(-count // _BLOCK)
            state["scale"], state["scale_sq"] = (self._zeros(blocks, torch.float32) for _ in range(2))
        return state

    def _zeros(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        if self.flat.paged:
            return torch.zeros(count, dtype=dtype, pin_memory=True)
        return torch.zeros(count, dtype=dtype, device=self.flat.master.device)

    def _maps(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The values of 8-bit codes: of signed moments, and of squared ones."""
        if device not in self._tables:
            from bitsandbytes.functional import create_dynamic_map

            self._tables[device] = (
                create_dynamic_map(signed=True).to(device),
                create_dynamic_map(signed=False).to(device),
            )
        return self._tables[device]


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, PAGED_CHUNK):
        yield slice(start, min(count, start + PAGED_CHUNK))


def _part(state: dict[str, torch.Tensor], name: str, rows: slice) -> torch.Tensor:
    """The elements of a state tensor that belong to ``rows`` of the weights: as many, or one for each block
    of them.
    """
    if name.startswith("scale"):
        return state[name][rows.start // _BLOCK : -(-rows.stop // _BLOCK)]
    return state[name][rows]
