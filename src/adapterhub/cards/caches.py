"""Keys and values of rows padded on the left: what prompts share is computed once, rows come and go."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from adapterhub.packaging.unwrapping import unwrap

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

STEP_COST = 16
"""Tokens that a forward pass is worth beyond its own, for it reads all weights: SmolLM2-135M's on a CPU."""


def begin_cache(
    model: PeftModel | PreTrainedModel, prompts: Sequence[list[int]], length: int
) -> DynamicCache | None:
    """The cache to continue ``prompts`` with, padded on the left to the longest, with room for ``length``.

    It holds what all prompts begin with already, where that saves more than it costs. None for a model whose
    layers keep anything but keys and values (recurrent states), which cannot be taken apart by tokens and
    rows: such a model makes its own.
    """
    inner = unwrap(model)
    if "past_key_values" not in inspect.signature(inner.forward).parameters:
        return None
    cache = _empty(inner, length)
    if any(type(layer) not in (_RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    shared = _common_beginning(prompts)
    if shared * (len(prompts) - 1) > STEP_COST:
        _fill(cache, model, prompts, shared)
    return cache


def gather_rows(
    model: PeftModel | PreTrainedModel,
    parts: Sequence[tuple[DynamicCache, Sequence[int]]],
    columns: int,
    length: int,
) -> DynamicCache:
    """The named rows of each cache in one, of ``columns`` tokens a row, with room for ``length``.

    Rows are aligned on the right, as left padding has them: what is more than ``columns`` is padding and
    goes, what is less is padded with zeros, which the mask has to hide.
    """
    result = _empty(unwrap(model), length)
    held: list[list[Any]] = [list(cache.layers) for cache, _ in parts]
    for number, layers in enumerate(zip(*held, strict=True)):
        if not layers[0].is_initialized:
            continue  # shares another layer's
        window = getattr(layers[0], "sliding_window", None)
        width = columns if window is None else min(columns, window - 1)
        keys, values = (
            torch.cat(
                [
                    _align(getattr(layer, name)[list(rows)], width)
                    for layer, (_, rows) in zip(layers, parts, strict=True)
                ]
            )
            for name in ("keys", "values")
        )
        result.update(keys, values, number)
        if window is not None:
            sliding: Any = result.layers[number]
            sliding.cumulative_length = columns
    return result


class _RoomyLayer(DynamicLayer):
    """transformers' own copies all it has for each token; this one has room for ``length`` tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (rows, heads, tokens, size) to both -> all keys and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < after:
            self._room = self._make_room(before, max(after, self._length), key_states, value_states)
        keys, values = self._room
        keys[:, :, before:after] = key_states
        values[:, :, before:after] = value_states
        self.keys, self.values = keys[:, :, :after], values[:, :, :after]
        return self.keys, self.values

    def _make_room(
        self, filled: int, length: int, *states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rooms = []
        for held, new in zip((self.keys, self.values), states, strict=True):
            room = new.new_empty(*new.shape[:2], length, new.shape[-1])
            if filled and held is not None:
                room[:, :, :filled] = held
            rooms.append(room)
        return rooms[0], rooms[1]


def _empty(inner: Any, length: int) -> DynamicCache:
    cache = DynamicCache(config=inner.config)
    cache.layers = [_RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _align(states: torch.Tensor, columns: int) -> torch.Tensor:
    """(rows, heads, tokens, size), cut or padded with zeros on the left to ``columns`` tokens."""
    return torch.nn.functional.pad(states, (0, 0, columns - states.shape[-2], 0))


def _common_beginning(prompts: Sequence[list[int]]) -> int:
    """How many first tokens all prompts share; the last of each prompt is left to be asked."""
    most = max(min(len(prompt) for prompt in prompts) - 1, 0)
    first = prompts[0]
    return next((at for at in range(most) if any(prompt[at] != first[at] for prompt in prompts)), most)


def _fill(cache: DynamicCache, model: Any, prompts: Sequence[list[int]], shared: int) -> None:
    """Put the first ``shared`` columns of the padded batch into ``cache``.

    A row that is padded by p has p masked columns there, then its first ``shared - p`` tokens: keys and
    values depend on a token's place in its own prompt, and not on its column.
    """
    once = _empty(unwrap(model), shared)
    layers: list[Any] = list(once.layers)
    model(input_ids=torch.tensor([prompts[0][:shared]], device=model.device), past_key_values=once)
    if any(layer.is_initialized and layer.keys.shape[-2] < shared for layer in layers):
        return  # a sliding window has dropped some
    width = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=model.device)
    columns = (torch.arange(shared, device=model.device) - padding[:, None]).clamp(min=0)
    for number, layer in enumerate(layers):
        if layer.is_initialized:
            keys, values = (states[0][:, columns].transpose(0, 1) for states in (layer.keys, layer.values))
            cache.update(keys, values, number)
