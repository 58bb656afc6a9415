"""Puts the fast path into a loaded model: adapters into one buffer, layers (or only their linears) into ours,
loss into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch

from adapterhub.errors import TrainingError
from adapterhub.trainer.fast import adapt, linears
from adapterhub.trainer.fast.attention import Sequences, sequences_of
from adapterhub.trainer.fast.block import Batch, Block, Engine, LayerFunction
from adapterhub.trainer.fast.flat import FlatAdapters, flatten
from adapterhub.trainer.fast.loss import IGNORED, LossFunction, NormFunction
from adapterhub.trainer.fast.offload import Offloader
from adapterhub.trainer.fast.optimizer import FlatAdamW
from adapterhub.trainer.fast.products import Products

if TYPE_CHECKING:
    from peft import PeftModel

    from adapterhub.trainer.activations import Level, Setting
    from adapterhub.trainer.plan import Plan
    from adapterhub.trainer.recipe import Recipe


class _Path:
    """What both ways of computing share: the adapters' buffer, their optimizer, and the loss in chunks.

    ``model(**batch, labels=…)`` goes through it; without labels, the model's own way.
    """

    def __init__(self, causal: Any, flat: FlatAdapters, operations: ModuleType) -> None:
        self.flat = flat
        self._causal = causal
        self._operations = operations
        self._plain: Callable[..., Any] = causal.forward
        self._anchor = torch.zeros((), device=flat.gradient.device, requires_grad=True)

    def optimizer(self, recipe: Recipe, setting: Setting) -> FlatAdamW:
        """The optimizer of the recipe, with the clipping inside; give transformers ``max_grad_norm`` 0."""
        training = recipe.training
        return FlatAdamW(
            self.flat,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            bits=8 if setting.optimizer == "paged_adamw_8bit" else 32,
        )

    def remove(self) -> None:
        """Give the model its own forward back; its adapter weights become tensors on its device again."""
        self._causal.forward = self._plain
        for parameter in self.flat.parameters:
            parameter.data = parameter.data.to(self.flat.gradient.device, copy=True)

    def _take_over(self, forward: Callable[..., Any]) -> None:
        causal, flat = self._causal, self.flat
        causal.forward = MethodType(lambda _causal, *args, **kwargs: forward(*args, **kwargs), causal)
        causal.register_load_state_dict_post_hook(lambda *_: flat.refresh())

    def _check_not_moved(self) -> None:
        if self.flat.moved:
            raise TrainingError(
                "the model was moved to another device or dtype after the fast path was installed",
                "move it before, or call FastPath.remove()",
            )

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | int | None) -> Any:
        """From the final norm's output (T, h) to what a causal model returns: the loss alone."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
        softcap = getattr(self._causal.config, "final_logit_softcapping", None)
        head = self._causal.get_output_embeddings().weight
        total = LossFunction.apply(hidden, head, shifted, softcap, self._operations)
        return CausalLMOutputWithPast(loss=total / ((shifted != IGNORED).sum() if count is None else count))

    def _check_plain(self) -> None:
        if self.flat.paged:
            raise TrainingError(
                "the adapter's weights are paged to the host, where the model's own forward cannot use them",
                "call FastPath.remove() before generating, or pass labels",
            )


class FastPath(_Path):
    """The fast path of one model: its layers are blocks."""

    def __init__(self, causal: Any, flat: FlatAdapters, blocks: list[Block], engine: Engine) -> None:
        super().__init__(causal, flat, engine.operations)
        self.blocks = blocks
        self._drops = any(group.drops for block in blocks for group in block.groups)
        self._norm = adapt.final_norm(causal.model, causal.config)
        self._take_over(self.forward)

    @staticmethod
    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        """Add to a collated batch, still on the CPU, where its sequences begin.

        ``sequence_starts`` int32 (sequences + 1) and ``longest_sequence``, an int: so no kernel launch waits
        for the device to say it.
        """
        sequences = sequences_of(batch["position_ids"])
        return {**batch, "sequence_starts": sequences.starts, "longest_sequence": sequences.longest}

    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, sequences: Sequences, *, training: bool
    ) -> torch.Tensor:
        """The final norm's output (T, h) for token ids (rows, length), T = rows · length."""
        decoder = self._causal.model
        embedded = decoder.embed_tokens(input_ids).to(self.flat.compute.dtype).flatten(0, 1)
        cos, sin = decoder.rotary_emb(embedded[None], position_ids.reshape(1, -1))
        seed = int(torch.randint(2**31, ())) if training and self._drops else None
        batch = Batch(cos[0], sin[0], sequences, seed, torch.is_grad_enabled())
        x = embedded
        for block in self.blocks:
            x = LayerFunction.apply(x, self._anchor, block, batch)
        norm = self._norm
        return NormFunction.apply(x, norm.weight, norm.eps, norm.offset, self._operations)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        sequence_starts: torch.Tensor | None = None,
        longest_sequence: int | None = None,
        **others: Any,
    ) -> Any:
        """What the causal model's ``forward`` becomes. With labels: the loss alone, in chunks."""
        if labels is None or input_ids is None:
            self._check_plain()
            return self._plain(input_ids=input_ids, labels=labels, position_ids=position_ids, **others)
        self._check_not_moved()
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if sequence_starts is None or longest_sequence is None:
            found = sequences_of(position_ids.cpu())
            sequences = Sequences(found.starts.to(input_ids.device), found.longest)
        else:
            sequences = Sequences(sequence_starts, longest_sequence)
        hidden = self.hidden_states(input_ids, position_ids, sequences, training=self._causal.training)
        return self._loss(hidden, labels, num_items_in_batch)


class LinearsPath(_Path):
    """Our products and loss inside transformers' own layers."""

    def __init__(self, causal: Any, flat: FlatAdapters, products: Products, operations: ModuleType) -> None:
        super().__init__(causal, flat, operations)
        linears.take_over(causal, flat, products, self._anchor)
        self._take_over(self.forward)

    @staticmethod
    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        """A collated batch as it is: transformers sees by its positions where sequences begin."""
        return batch

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **others: Any,
    ) -> Any:
        """What the causal model's ``forward`` becomes. With labels: the loss alone, in chunks."""
        if labels is None or input_ids is None:
            self._check_plain()
            return self._plain(input_ids=input_ids, labels=labels, **others)
        self._check_not_moved()
        # A cache would hide from transformers that rows are packed.
        decoded = self._causal.model(input_ids=input_ids, **{**others, "use_cache": False})
        return self._loss(decoded.last_hidden_state.flatten(0, 1), labels, num_items_in_batch)

    def remove(self) -> None:
        """As ``FastPath.remove``; and the adapted modules compute as peft has them again."""
        linears.give_back(self._causal)
        super().remove()


def install_fast_path(model: PeftModel, recipe: Recipe, plan: Plan) -> FastPath | LinearsPath:
    """Train ``model`` (4-bit base, LoRA by peft) through the fast path from now on, as ``plan`` says.

    The adapter's parameters become views of one float32 buffer, so that saving and loading work as before;
    the optimizer must be the path's, and batches must have gone through its ``prepare``. Raises TrainingError
    when the model or the adapter needs what the fast path does not have (``plan`` chooses the plain engine
    for those).
    """
    causal = model.get_base_model()
    device, dtype = next(causal.parameters()).device, _compute_dtype(recipe)
    adapter = model.peft_config["default"]
    in_layers = plan.setting.engine == "linears"
    if in_layers:
        reason = adapt.unsupported_linears(causal, adapter)
    else:
        reason = adapt.unsupported(causal, adapter, dtype, device)
    if reason is not None:
        raise TrainingError(f"the fast path cannot train this model: {reason}", "train with the plain engine")
    install = install_linears if in_layers else install_blocks
    return install(causal, plan.setting, dtype, device)


def install_blocks(causal: Any, setting: Setting, dtype: torch.dtype, device: torch.device) -> FastPath:
    """``install_fast_path`` without its checks; ``dtype`` is what products are computed in."""
    layers = causal.model.layers
    flat = _flat(adapt.adapter_parameters(layers), setting, dtype, device)
    operations = _operations(device)
    offloader = Offloader(device) if setting.offload and device.type == "cuda" else None
    engine = Engine(Products(operations, dtype, device), operations, offloader)
    blocks = [
        adapt.build_block(layer, index, causal.config, flat, engine, _level(index, setting))
        for index, layer in enumerate(layers)
    ]
    for block in blocks[: setting.kept_weights]:
        for group in block.groups:
            engine.products.keep(group)
    return FastPath(causal, flat, blocks, engine)


def install_linears(causal: Any, setting: Setting, dtype: torch.dtype, device: torch.device) -> LinearsPath:
    """The same for transformers' own layers: only their adapted linears and the loss become ours."""
    flat = _flat(linears.adapter_parameters(causal), setting, dtype, device)
    operations = _operations(device)
    return LinearsPath(causal, flat, Products(operations, dtype, device), operations)


def _flat(
    parameters: Iterable[torch.nn.Parameter], setting: Setting, dtype: torch.dtype, device: torch.device
) -> FlatAdapters:
    paged = setting.optimizer != "adamw" and device.type == "cuda"
    return flatten(list(parameters), dtype, device, paged=paged)


def _level(index: int, setting: Setting) -> Level:
    """Early layers keep least: their values would be held longest."""
    if index < setting.recompute_all:
        return "all"
    return "mlp" if index < setting.recompute_all + setting.recompute_mlp else "none"


def _operations(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from adapterhub.trainer.fast import kernels

        return kernels
    from adapterhub.trainer.fast import reference

    return reference


def _compute_dtype(recipe: Recipe) -> torch.dtype:
    name = recipe.quantization.compute_dtype if recipe.quantization else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
