"""FSDP2: base, adapter and optimizer divided among the processes of a run by torch's ``fully_shard``.

Each decoder layer is a group that is gathered when it computes; what is left (embeddings, head, last norm) is
one more. A 4-bit weight is divided like any other when its codes are stored as bf16 numbers, which changes
no code (``bnb_4bit_quant_storage``). What is written is gathered first, in one form whatever the number of
processes: a run may go on with another one, or without FSDP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from adapterhub.errors import RecipeError
from adapterhub.trainer.ranks import world_size
from adapterhub.trainer.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel


def check_shardable(recipe: Recipe) -> None:
    """Raise RecipeError for what cannot be divided right."""
    if recipe.quantization is not None and recipe.quantization.type == "int8":
        raise RecipeError(
            "FSDP cannot divide int8 weights: their scales are not parameters",
            "set quantization.type to nf4, or launch without --use_fsdp",
        )
    for name, there in (
        ("lora.dora", recipe.lora.dora),
        ("lora.init pissa", recipe.lora.init == "pissa"),
        ("lora.new_tokens", bool(recipe.lora.new_tokens)),
    ):
        if there:
            raise RecipeError(
                f"{name} needs whole weights, which FSDP divides",
                "leave it out, or launch without --use_fsdp",
            )
    if recipe.training.optimizer not in ("auto", "adamw"):
        raise RecipeError(
            f"training.optimizer {recipe.training.optimizer} cannot page what FSDP divides",
            "set it to auto: each process holds its part of the state only",
        )


def shard(model: PeftModel) -> None:
    """Divide the parameters of ``model`` among all processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    causal: Any = model.get_base_model()
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for layer in causal.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(causal, mesh=mesh)


def gathered(state: Any) -> Any:
    """``state`` (a tensor, or dicts and lists of them) with each divided tensor whole, on the CPU.

    Every process must call it with the same structure.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        return state.full_tensor().detach().cpu()
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return state


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trained parameters whole, by their names in the model."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found: dict[str, torch.Tensor] = gathered(trained)
    return found


def divided(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole optimizer state dict with its moments divided as the optimizer's parameters are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in state["state"].items():
        like = parameters[number]
        for name, value in moments.items():
            if isinstance(like, DTensor) and isinstance(value, torch.Tensor) and value.shape == like.shape:
                moments[name] = distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return state
