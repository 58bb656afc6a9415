"""Second moments of what goes into a model's linear layers, gathered over text within a memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.packaging.unwrapping import unwrap

if TYPE_CHECKING:
    import torch

MEMORY_BYTES = 2 * 1024**3
"""What the moments of one pass over the text may take."""


def group_layers(widths: Mapping[str, int], budget: int = MEMORY_BYTES) -> Iterator[list[str]]:
    """The layers of ``widths`` (inputs by name) in groups, each group's moments within ``budget`` bytes.

    A layer that is over it alone makes a group of its own.
    """
    group: list[str] = []
    taken = 0
    for name, width in widths.items():
        size = 4 * width * width
        if group and taken + size > budget:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += size
    if group:
        yield group


def second_moments(
    model: Any, layers: Sequence[str], texts: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """E[x·xᵀ] of the inputs x of each of ``layers`` over every token of ``texts``, float32 (in, in).

    ``model`` is a causal language model of transformers in evaluation mode, or a PeftModel, whose ``layers``
    are named as in its base; memory holds one matrix a layer.
    """
    import torch

    plain = unwrap(model)
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()
            if name in sums:
                sums[name].addmm_(rows.T, rows)
            else:
                sums[name] = rows.T @ rows

        return add

    handles = [plain.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        with torch.inference_mode():
            for ids in texts:
                model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(len(ids) for ids in texts)
    return {name: total / tokens for name, total in sums.items()}
