"""An optimizer's state by the names of the parameters it trains: one form, whichever engine wrote it.

One GPU trains by the fast path and its flat AdamW, several by torch's or bitsandbytes'; a run may be stopped
under one and go on under another. In 32 bits all of them hold the same two moments for each weight (AdamW,
Loshchilov and Hutter 2019), only under other names and in other buffers. 8-bit moments stay as their
optimizer holds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from adapterhub.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel

_MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_BITSANDBYTES = ("state1", "state2")


def portable(optimizer: torch.optim.Optimizer, model: PeftModel) -> dict[str, Any]:
    """``optimizer``'s state, to be saved: learning rate, and by parameter name the steps and both moments.

    Moments are float32 of the parameter's shape, where the optimizer has them; 8-bit ones are its own state
    dict, with its kind.
    """
    if _in_8_bits(optimizer):
        return {"kind": _kind(optimizer), "state": optimizer.state_dict()}
    lr = float(optimizer.param_groups[0]["lr"])
    return {"lr": lr, "moments": dict(_moments(optimizer, model))}


def restore(optimizer: torch.optim.Optimizer, model: PeftModel, saved: Any, where: str) -> None:
    """Give ``optimizer`` the state that ``portable`` returned, of this or of another optimizer.

    Raises TrainingError, naming ``where`` it was read, when it is none, or in the 8 bits of another one.
    """
    if not isinstance(saved, dict) or not (
        {"kind", "state"} <= set(saved) or {"lr", "moments"} <= set(saved)
    ):
        raise TrainingError(
            f"{where} is no optimizer state of this version's",
            "remove that folder: --resume then takes the checkpoint before it, or begins anew",
        )
    kind = saved.get("kind")
    if kind != (_kind(optimizer) if _in_8_bits(optimizer) else None):
        raise TrainingError(
            f"{where} holds the state of another optimizer, {kind or 'in 32 bits'}",
            "go on with as many processes and GPUs as before: 8-bit state is only read by what wrote it",
        )
    if kind is not None:
        optimizer.load_state_dict(saved["state"])
        return
    from adapterhub.trainer.fast.optimizer import FlatAdamW

    moments: dict[str, dict[str, Any]] = saved["moments"]
    if isinstance(optimizer, FlatAdamW):
        optimizer.load_moments(
            {id(value): moments[name] for name, value in model.named_parameters() if name in moments}
        )
    else:
        _load(optimizer, model, moments)
    for group in optimizer.param_groups:
        group["lr"] = saved["lr"]


def _moments(optimizer: torch.optim.Optimizer, model: PeftModel) -> Iterator[tuple[str, dict[str, Any]]]:
    from adapterhub.trainer.fast.optimizer import FlatAdamW

    flat = optimizer.moments() if isinstance(optimizer, FlatAdamW) else None
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter) if flat is None else flat.get(id(parameter))
        if state:
            keys = _OF_BITSANDBYTES if _is_of_bitsandbytes(optimizer) else _MOMENTS
            moments = {ours: state[key] for ours, key in zip(_MOMENTS, keys, strict=True)}
            yield name, {"step": int(state["step"]), **moments}


def _load(optimizer: torch.optim.Optimizer, model: PeftModel, moments: dict[str, dict[str, Any]]) -> None:
    """Moments into an optimizer that keeps them parameter by parameter."""
    from adapterhub.trainer.sharding import divided

    names = {id(value): name for name, value in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    paged = _is_of_bitsandbytes(optimizer)
    state = optimizer.state_dict()
    for number, parameter in enumerate(parameters):
        found = moments.get(names[id(parameter)])
        if found is None:
            continue
        step = int(found["step"])
        keys = _OF_BITSANDBYTES if paged else _MOMENTS
        state["state"][number] = {
            "step": step if paged else torch.tensor(float(step)),
            **{key: found[name] for key, name in zip(keys, _MOMENTS, strict=True)},
        }
    optimizer.load_state_dict(divided(state, optimizer))


def _in_8_bits(optimizer: torch.optim.Optimizer) -> bool:
    from adapterhub.trainer.fast.optimizer import FlatAdamW

    if isinstance(optimizer, FlatAdamW):
        return optimizer.bits == 8
    return _is_of_bitsandbytes(optimizer) and optimizer.args.optim_bits == 8  # type: ignore[attr-defined]


def _is_of_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes.")


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__name__} in 8 bits"
