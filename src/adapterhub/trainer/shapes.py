"""A model's shape, read from its config.json: how many weights it has, where, and which of them are
quantized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import RecipeError

MAX_CONFIG_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Linear:
    """One kind of linear module, as often as the model has it."""

    path: str
    """Inside its layer, like ``self_attn.q_proj``."""
    inputs: int
    """Features in."""
    outputs: int
    """Features out."""
    bias: bool
    count: int
    """How many the whole model has: one a layer."""

    @property
    def weights(self) -> int:
        """Weights of one module, without its bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer's dimensions."""

    model_type: str
    """transformers' name of the architecture, like ``llama``."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    """Key and value heads; fewer than ``heads`` with grouped-query attention."""
    head_dim: int
    vocab: int
    tied: bool
    """Whether the output head is the embedding matrix."""
    linears: tuple[Linear, ...]
    """The text layers' linear modules; all of them are quantized, the output head is not."""
    layer_norm_weights: int
    """Norm weights of one layer."""
    tower: tuple[Linear, ...] = ()
    """Linear modules of a vision tower: loaded and quantized with the model, idle while text is trained."""
    tower_weights: int = 0
    """Parameters of the vision tower beside its linears' weights."""
    head_norms: bool = False
    """Whether each head of query and key is normed (Qwen 3, Gemma 3)."""
    softcap: bool = False
    """Whether attention scores are soft-capped (Gemma 2): transformers computes them as matrices then, for no
    fused kernel of torch does that, and caps the head's logits too.
    """
    activation: str = "silu"
    """transformers' name of the function on the MLP's gate."""
    dropout: str | None = None
    """The key of a dropout that the base has of its own in training, like ``attention_dropout``."""

    @property
    def quantized_weights(self) -> int:
        """Weights that 4-bit or 8-bit loading quantizes: every linear module's but the output head's."""
        return sum(linear.weights * linear.count for linear in (*self.linears, *self.tower))

    @property
    def plain_weights(self) -> int:
        """Parameters that stay in 16 bits: embeddings, output head, norms, biases."""
        biases = sum(linear.outputs * linear.count for linear in (*self.linears, *self.tower) if linear.bias)
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + biases + self.layers * self.layer_norm_weights + self.hidden + self.tower_weights

    @property
    def parameters(self) -> int:
        """All parameters, shared ones counted once."""
        return self.quantized_weights + self.plain_weights

    @property
    def normed_features(self) -> int:
        """Features a token that the norms of one layer take."""
        if not self.head_norms:
            return self.layer_norm_weights
        return self.layer_norm_weights + (self.heads + self.kv_heads - 2) * self.head_dim

    @property
    def largest_linear(self) -> int:
        """Weights of the largest linear module of a text layer: what one dequantized copy holds."""
        return max(linear.weights for linear in self.linears)

    def modules(self) -> Iterator[tuple[str, Linear, int | None]]:
        """Each quantized linear module: its dotted name in transformers' model, its kind, its text layer."""
        text = "model.language_model" if self.tower else "model"
        for layer in range(self.layers):
            for linear in self.linears:
                yield f"{text}.layers.{layer}.{linear.path}", linear, layer
        for linear in self.tower:
            for layer in range(linear.count):
                yield f"model.vision_tower.encoder.layers.{layer}.{linear.path}", linear, None


@dataclass(frozen=True)
class _Family:
    """What an architecture adds to the plain LLaMA block, and what its config.json may leave out."""

    fused: bool = False
    """Query, key and value in one module, gate and up in another (Phi-3)."""
    qkv_bias: bool | None = None
    """None: as ``attention_bias`` says."""
    o_bias: bool | None = None
    norms: int = 2
    """Norms over ``hidden`` in a layer."""
    head_norms: bool = False
    """Norms over ``head_dim`` on query and key (Qwen 3, Gemma 3)."""
    softcap: bool = False
    defaults: Mapping[str, Any] | None = None
    """transformers' own values for keys that published files leave out."""


_FAMILIES = {
    "llama": _Family(),
    "smollm3": _Family(defaults={"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral": _Family(qkv_bias=False, o_bias=False, defaults={"num_key_value_heads": 8}),
    "qwen2": _Family(qkv_bias=True, o_bias=False, defaults={"num_key_value_heads": 32}),
    "qwen3": _Family(head_norms=True, defaults={"num_key_value_heads": 32, "head_dim": 128}),
    "gemma": _Family(
        defaults={
            "num_key_value_heads": 16,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "vocab_size": 256_000,
        }
    ),
    "gemma2": _Family(
        norms=4,
        softcap=True,
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "vocab_size": 256_000,
        },
    ),
    "gemma3_text": _Family(
        norms=4,
        head_norms=True,
        defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "vocab_size": 262_208,
        },
    ),
    "phi3": _Family(fused=True, qkv_bias=False, o_bias=False),
}
_NESTED = {"gemma3": "gemma3_text"}
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")
# What configurations of mixtures of experts have, by any name: their experts are not linear modules.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

KNOWN_TYPES = (*_FAMILIES, *_NESTED)


def read_shape(config: Path) -> ModelShape:
    """The shape in a config.json file. Raises RecipeError when it cannot be read or the architecture is
    unknown.
    """
    if not config.is_file():
        raise RecipeError(f"{config}: no such file", "name the folder of a transformers checkpoint")
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise RecipeError(f"{config} is over {MAX_CONFIG_BYTES} bytes", "name a model's config.json")
    try:
        content = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as err:
        raise RecipeError(
            f"{config} is not valid JSON: {err}", "take it from the model's source again"
        ) from err
    if not isinstance(content, dict):
        raise RecipeError(f"{config} is not a JSON object", "take it from the model's source again")
    return shape_of(content, str(config))


def shape_of(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that a config.json's content describes; ``where`` names it in errors.

    LLaMA 2 and 3, SmolLM, SmolLM3, Mistral, Qwen 2, 2.5 and 3, Gemma 1 to 3, Phi-3 and Phi-4. Raises
    RecipeError for any other architecture, and for keys that are missing or not positive whole numbers.
    """
    model_type = str(config.get("model_type"))
    tower_config: Any = None
    if model_type in _NESTED:
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            raise RecipeError(
                f"{where}: text_config is missing", "take config.json from the model's source again"
            )
        tower_config = config.get("vision_config")
        tied = config.get("tie_word_embeddings", True)
        config, model_type = {"tie_word_embeddings": tied, **inner}, _NESTED[model_type]
    if model_type not in _FAMILIES:
        experts = " (a mixture of experts)" if any(config.get(key) for key in _EXPERTS) else ""
        raise RecipeError(
            f"{where}: the architecture {model_type!r}{experts} is not known to the planner",
            f"choose a base of one of these: {', '.join(KNOWN_TYPES)}",
        )
    shape = _text_shape(_Reader(config, _FAMILIES[model_type].defaults or {}, where), model_type)
    if not isinstance(tower_config, Mapping):
        return shape
    linears, weights = _tower(_Reader(tower_config, _SIGLIP, f"{where}: vision_config"), shape.hidden)
    return ModelShape(**{**vars(shape), "tower": linears, "tower_weights": weights})


class _Reader:
    """Reads dimensions out of a config, with defaults and errors that name the key."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._defaults = defaults
        self._where = where

    def size(self, key: str, otherwise: int | None = None) -> int:
        """A positive whole number; ``otherwise`` stands for a key that is absent or null."""
        value = self._value(key)
        if value is None:
            value = otherwise
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise RecipeError(
                f"{self._where}: {key} is {value!r}, not a positive whole number",
                "take config.json from the model's source again",
            )
        return value

    def flag(self, key: str) -> bool:
        return bool(self._value(key))

    def word(self, key: str, otherwise: str) -> str:
        return str(self._value(key) or otherwise)

    def _value(self, key: str) -> Any:
        return self._config[key] if key in self._config else self._defaults.get(key)


def _text_shape(read: _Reader, model_type: str) -> ModelShape:
    family = _FAMILIES[model_type]
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    kv_heads = read.size("num_key_value_heads", otherwise=heads)
    head_dim = read.size("head_dim", otherwise=max(1, hidden // heads))
    intermediate, layers = read.size("intermediate_size"), read.size("num_hidden_layers")
    biased = read.flag("attention_bias")
    dimensions = _Dimensions(hidden, intermediate, heads * head_dim, kv_heads * head_dim)
    linears = _block(
        dimensions,
        layers,
        fused=family.fused,
        qkv_bias=biased if family.qkv_bias is None else family.qkv_bias,
        o_bias=biased if family.o_bias is None else family.o_bias,
        mlp_bias=read.flag("mlp_bias"),
    )
    return ModelShape(
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=read.size("vocab_size"),
        tied=read.flag("tie_word_embeddings"),
        linears=tuple(linears),
        layer_norm_weights=family.norms * hidden + (2 * head_dim if family.head_norms else 0),
        head_norms=family.head_norms,
        softcap=family.softcap,
        activation=_activation(read, model_type),
        dropout=next((key for key in _DROPOUTS if read.flag(key)), None),
    )


def _activation(read: _Reader, model_type: str) -> str:
    """Gemma's older configurations name another GELU than its models have; transformers corrects them too."""
    if not model_type.startswith("gemma"):
        return read.word("hidden_act", "silu")
    found = read.word("hidden_act" if model_type == "gemma" else "hidden_activation", "gelu_pytorch_tanh")
    return "gelu_pytorch_tanh" if found == "gelu" else found


@dataclass(frozen=True)
class _Dimensions:
    hidden: int
    intermediate: int
    queries: int
    keys: int


def _block(
    size: _Dimensions, layers: int, *, fused: bool, qkv_bias: bool, o_bias: bool, mlp_bias: bool
) -> Iterator[Linear]:
    """A decoder layer's linear modules in the order of their use."""
    if fused:
        yield Linear("self_attn.qkv_proj", size.hidden, size.queries + 2 * size.keys, qkv_bias, layers)
    else:
        yield Linear("self_attn.q_proj", size.hidden, size.queries, qkv_bias, layers)
        yield Linear("self_attn.k_proj", size.hidden, size.keys, qkv_bias, layers)
        yield Linear("self_attn.v_proj", size.hidden, size.keys, qkv_bias, layers)
    yield Linear("self_attn.o_proj", size.queries, size.hidden, o_bias, layers)
    if fused:
        yield Linear("mlp.gate_up_proj", size.hidden, 2 * size.intermediate, mlp_bias, layers)
    else:
        yield Linear("mlp.gate_proj", size.hidden, size.intermediate, mlp_bias, layers)
        yield Linear("mlp.up_proj", size.hidden, size.intermediate, mlp_bias, layers)
    yield Linear("mlp.down_proj", size.intermediate, size.hidden, mlp_bias, layers)


_SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "vision_use_head": True,
}


def _tower(read: _Reader, text_hidden: int) -> tuple[tuple[Linear, ...], int]:
    """A SigLIP vision tower's linear modules, and its parameters beside their weights and biases."""
    hidden, intermediate = read.size("hidden_size"), read.size("intermediate_size")
    layers, patch = read.size("num_hidden_layers"), read.size("patch_size")
    linears = [
        Linear(f"self_attn.{name}", hidden, hidden, True, layers)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    linears += [
        Linear("mlp.fc1", hidden, intermediate, True, layers),
        Linear("mlp.fc2", intermediate, hidden, True, layers),
    ]
    patches = (read.size("image_size") // patch) ** 2
    weights = (
        hidden * (read.size("num_channels") * patch**2 + 1) + patches * hidden
    )  # patch and position embeddings
    weights += layers * 4 * hidden + 2 * hidden  # layer norms, with biases
    weights += hidden * text_hidden + hidden  # projector
    if read.flag("vision_use_head"):  # probe, attention, norm and MLP of the pooling head
        weights += (
            hidden + 4 * (hidden**2 + hidden) + 2 * hidden + 2 * hidden * intermediate + intermediate + hidden
        )
    return tuple(linears), weights
