"""From a transformers model with a peft adapter to blocks: which architectures the fast path knows, and how
it reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub.errors import TrainingError
from adapterhub.trainer.activations import Level
from adapterhub.trainer.engines import FAST_ACTIVATIONS, FAST_HEAD, FAST_TYPES
from adapterhub.trainer.fast.block import Block, Engine, Norm
from adapterhub.trainer.fast.flat import FlatAdapters
from adapterhub.trainer.fast.weights import Adapter, Group, Linear, frozen_weight

ADAPTER = "default"


@dataclass(frozen=True)
class LayerModules:
    """The linear modules of one decoder layer, grouped by the input they share."""

    qkv: list[Any]
    output: list[Any]
    gate_up: list[Any]
    down: list[Any]

    @property
    def groups(self) -> tuple[list[Any], ...]:
        """In the order of use."""
        return (self.qkv, self.output, self.gate_up, self.down)


def unsupported(causal: Any, peft_config: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the fast path cannot train this model with this adapter, or None when it can.

    ``dtype`` is what products are to be computed in on ``device``.
    """
    config = causal.config
    reason = unsupported_adapter(peft_config)
    if reason is not None:
        return reason
    if config.model_type not in FAST_TYPES:
        return f"the architecture {config.model_type} has no hand-written layer"
    if getattr(config, "hidden_act", None) not in FAST_ACTIVATIONS:
        return f"the activation {getattr(config, 'hidden_act', None)} has no kernel"
    if device.type == "cuda" and dtype == torch.float32:
        return "attention has no kernel for float32 on CUDA"
    head_dim = causal.model.layers[0].self_attn.head_dim
    if device.type == "cuda" and (head_dim % 8 or head_dim > FAST_HEAD):
        return f"attention has no kernel for heads of {head_dim} features on CUDA"
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(config, name, 0.0):
            return f"{name} is not zero"
    return _unsupported_module(causal)


def unsupported_adapter(peft_config: Any) -> str | None:
    """Why none of our products can train this adapter, or None when they can."""
    for name in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices"):
        if getattr(peft_config, name, None):
            return f"the adapter has {name}"
    return "the adapter trains biases" if peft_config.bias != "none" else None


def unsupported_linears(causal: Any, peft_config: Any) -> str | None:
    """Why our products cannot train inside this model's own layers, or None when they can."""
    from bitsandbytes.nn import Linear4bit

    reason = unsupported_adapter(peft_config)
    if reason is not None:
        return reason
    for name, module in causal.named_modules():
        if is_adapted(module) and not isinstance(module.base_layer, Linear4bit):
            return f"{name} is not a 4-bit linear"
        if is_adapted(module) and module.base_layer.in_features % 8:
            return f"{name} has {module.base_layer.in_features} inputs, not a multiple of 8"
        if getattr(module, "lora_variant", None):
            return f"{name} is a variant of LoRA"
    if getattr(causal.get_output_embeddings(), "bias", None) is not None:
        return "the head has a bias"
    return None


def _unsupported_module(causal: Any) -> str | None:
    from bitsandbytes.nn import Linear4bit

    layers = causal.model.layers
    known = {id(module) for layer in layers for group in layer_modules(layer).groups for module in group}
    for name, module in causal.named_modules():
        if id(module) in known:
            base = module.base_layer if is_adapted(module) else module
            if not isinstance(base, Linear4bit):
                return f"{name} is not a 4-bit linear"
            if is_adapted(module) and base.in_features % 8:
                return f"{name} has {base.in_features} inputs, not a multiple of 8"
        elif is_adapted(module):
            return f"{name} has an adapter, outside the layers' linear modules"
        if getattr(module, "lora_variant", None):
            return f"{name} is a variant of LoRA"
    return None


def layer_modules(layer: Any) -> LayerModules:
    """The linear modules of a decoder layer, as peft or bitsandbytes made them."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        return LayerModules([attention.qkv_proj], [attention.o_proj], [mlp.gate_up_proj], [mlp.down_proj])
    return LayerModules(
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )


def adapter_parameters(layers: Any) -> Iterator[torch.nn.Parameter]:
    """Every adapter's weights in the order that the flat buffer needs: by group all A, then all B."""
    for layer in layers:
        for group in layer_modules(layer).groups:
            adapted = [module for module in group if is_adapted(module)]
            for factors in ("lora_A", "lora_B"):
                yield from (getattr(module, factors)[ADAPTER].weight for module in adapted)


def build_block(
    layer: Any, index: int, config: Any, flat: FlatAdapters, engine: Engine, level: Level
) -> Block:
    """The block of one decoder layer; its weights are the layer's own, not copies."""
    attention, modules = layer.self_attn, layer_modules(layer)
    groups = [Group([linear_of(module, flat) for module in group]) for group in modules.groups]
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    for group in groups:
        engine.products.reserve(group)
    head_norms = None
    if hasattr(attention, "q_norm"):
        head_norms = (_norm(attention.q_norm, config), _norm(attention.k_norm, config))
    return Block(
        engine,
        index=index,
        qkv=groups[0],
        output=groups[1],
        gate_up=groups[2],
        down=groups[3],
        norms=(_norm(layer.input_layernorm, config), _norm(layer.post_attention_layernorm, config)),
        head_norms=head_norms,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=attention.scaling,
        rotary=bool(getattr(attention, "use_rope", True)),
        window=_window(attention, config),
        activation=FAST_ACTIVATIONS[config.hidden_act],
        level=level,
    )


def final_norm(decoder: Any, config: Any) -> Norm:
    """The norm before the head."""
    return _norm(decoder.norm, config)


def linear_of(module: Any, flat: FlatAdapters) -> Linear:
    """A module's frozen weight and its adapter, if it has one, as views of ``flat``."""
    base = module.base_layer if is_adapted(module) else module
    weight = frozen_weight(base)
    bias = None if base.bias is None else base.bias.detach().to(flat.compute.dtype)
    if not is_adapted(module):
        return Linear(weight, bias, None)
    a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    drop = module.lora_dropout[ADAPTER]
    adapter = Adapter(
        a=flat.compute_view(a),
        b=flat.compute_view(b),
        grad_a=flat.gradient_view(a),
        grad_b=flat.gradient_view(b),
        scale=float(module.scaling[ADAPTER]),
        dropout=float(getattr(drop, "p", 0.0)),
    )
    return Linear(weight, bias, adapter)


def is_adapted(module: Any) -> bool:
    """Whether peft has put our adapter on it."""
    return hasattr(module, "lora_A") and ADAPTER in module.lora_A


def _norm(module: Any, config: Any) -> Norm:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        raise TrainingError(f"{type(module).__name__} has no epsilon", "train with the plain engine")
    return Norm(module.weight.detach(), float(eps), 1.0 if config.model_type.startswith("gemma") else 0.0)


def _window(attention: Any, config: Any) -> int | None:
    """Tokens that attention looks back, itself included, or None for all."""
    if hasattr(attention, "sliding_window"):
        found = attention.sliding_window
    else:
        found = getattr(config, "sliding_window", None) if config.model_type in ("mistral", "phi3") else None
    return None if found is None else int(found)
