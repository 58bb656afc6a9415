"""A causal language model's decoder, run one layer at a time with weights that are handed to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import ReleaseError
from adapterhub.packaging.fidelity import decoder_layers, hidden_states

if TYPE_CHECKING:
    import torch

Weights = Mapping[str, Callable[[], "torch.Tensor"]]
"""From a tensor's name in the checkpoint to what computes it, float32."""

_FIX = "merge with --rounding nearest"


class _Reached(Exception):
    """The forward pass came to where it was to stop."""


@dataclass
class Row:
    """One text on its way through the decoder."""

    wanted: torch.Tensor
    """What the next layer gets in the wanted model, (1, tokens, hidden)."""
    rounded: torch.Tensor
    """What it gets from the layers below as they are rounded."""
    arguments: list[dict[str, Any]]
    """What each layer is called with beside that: positions and masks."""


class Decoder:
    """Holds no weights but those of the layer at hand."""

    def __init__(self, folder: Path, changed: Mapping[str, Any], weights: Weights, device: str) -> None:
        """``folder`` has the configuration, ``changed`` what is otherwise in it.

        Computes in float32. Raises ReleaseError for a model that
        transformers cannot build, or whose layers are not listed as ``model.layers``.
        """
        import torch
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self._weights, self._device = weights, device
        self._dtype = torch.float32
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            for key, value in changed.items():
                setattr(config, key, value)
            # Buffers are no weights: rotary frequencies are computed here as the model computes them.
            with init_empty_weights(include_buffers=False):
                self._model = AutoModelForCausalLM.from_config(
                    config, dtype=self._dtype, trust_remote_code=False
                )
        except (OSError, ValueError, KeyError) as err:
            first = (str(err).strip() or type(err).__name__).splitlines()[0][:200]
            raise ReleaseError(f"{folder} is no model that transformers can build: {first}", _FIX) from err
        self._model.eval()
        for module in self._model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(device)
        self.layers = decoder_layers(self._model)
        """Each decoder layer's name and itself, without weights."""

    def enter(self, texts: Sequence[Sequence[int]]) -> list[Row]:
        """The rows in front of the first layer; ``texts`` are token ids."""
        import torch

        embeddings = self._model.get_input_embeddings()
        name = next(name for name, module in self._model.named_modules() if module is embeddings)
        empty = embeddings.weight
        _put(embeddings, "weight", self._get(f"{name}.weight").to(self._dtype))
        with torch.inference_mode():
            rows = [self._enter(torch.tensor([list(ids)], device=self._device)) for ids in texts]
        embeddings.weight = empty
        return rows

    def _enter(self, ids: torch.Tensor) -> Row:
        entered: list[torch.Tensor] = []
        arguments: list[dict[str, Any]] = []

        def record(hidden: torch.Tensor, **given: Any) -> torch.Tensor:
            entered.append(hidden)
            arguments.append(given)
            if len(arguments) == len(self.layers):
                raise _Reached
            return hidden

        for _name, layer in self.layers:
            layer.forward = record
        try:
            with suppress(_Reached):
                self._model.get_decoder()(input_ids=ids, use_cache=False)
        finally:
            for _name, layer in self.layers:
                del layer.forward
        return Row(entered[0], entered[0], arguments)

    def fill(self, number: int, given: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """A copy of layer ``number`` with its weights; those that ``given`` has, by full name, are its.

        Raises ReleaseError when the checkpoint lacks one that the layer has.
        """
        name, layer = self.layers[number]
        filled = copy.deepcopy(layer)
        for key, _empty in list(filled.named_parameters()):
            full = f"{name}.{key}"
            value = given[full] if full in given else self._get(full)
            owner, _dot, leaf = key.rpartition(".")
            _put(filled.get_submodule(owner), leaf, value.to(self._device, self._dtype))
        return filled

    def _get(self, name: str) -> torch.Tensor:
        if name not in self._weights:
            raise ReleaseError(f"the checkpoint has no tensor {name!r}, which the model needs", _FIX)
        return self._weights[name]()


def run_layer(layer: torch.nn.Module, number: int, hidden: torch.Tensor, row: Row) -> torch.Tensor:
    """What the layer makes of ``hidden``, (1, tokens, hidden)."""
    return hidden_states(layer(hidden, **row.arguments[number]))


def inputs_of(
    layer: torch.nn.Module, number: int, hidden: torch.Tensor, row: Row, module: str
) -> torch.Tensor:
    """What the linear layer ``module`` of the layer gets, (tokens, in); nothing after it is computed."""
    seen: list[torch.Tensor] = []

    def stop(_module: Any, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(given[0])
        raise _Reached

    handle = layer.get_submodule(module).register_forward_pre_hook(stop)
    try:
        with suppress(_Reached):
            run_layer(layer, number, hidden, row)
    finally:
        handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@contextmanager
def watched(layer: torch.nn.Module, modules: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What each of ``modules`` got in the last forward pass, by name in the order in which they ran.

    Those that get one and the same tensor have it in common. (tokens, in) each.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_module: Any, given: tuple[torch.Tensor, ...]) -> None:
            seen[name] = given[0].reshape(-1, given[0].shape[-1])

        return hook

    handles = [layer.get_submodule(name).register_forward_pre_hook(keep(name)) for name in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _put(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    import torch

    setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
