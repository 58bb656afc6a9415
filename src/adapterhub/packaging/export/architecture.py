"""What llama.cpp calls a model, its parts and its settings, from a transformers configuration.

Names and settings as llama.cpp's own converter writes them (convert_hf_to_gguf.py); what it would leave out
without a word is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter, TensorNameMap

# transformers' model type -> llama.cpp's architecture
_NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# llama.cpp's own kernel for these rotates neighbouring numbers, where transformers rotates halves.
_NEIGHBOURS = ("llama",)
_NO_USE = "serve it with transformers or vLLM instead"
# Tensors that old checkpoints hold though they follow from the configuration.
_COMPUTED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(frozen=True)
class Architecture:
    """A model that llama.cpp knows."""

    name: str
    """llama.cpp's, like ``llama``."""
    config: Mapping[str, Any]
    """config.json, whose settings were found to be among those that llama.cpp has."""
    folder: Path
    """Where it was read."""

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def key_value_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_size(self) -> int:
        """Numbers of one attention head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)

    @property
    def context(self) -> int:
        """Tokens up to which llama.cpp computes what transformers does: it has no sliding window here."""
        longest = int(self.config["max_position_embeddings"])
        return min(longest, int(self.config["sliding_window"])) if self.slides else longest

    @property
    def slides(self) -> bool:
        """Whether layers look back over a window only."""
        asked = self.config["model_type"] == "mistral" or self.config.get("use_sliding_window")
        return bool(asked and self.config.get("sliding_window"))

    def tensor_name(self, name: str) -> str | None:
        """llama.cpp's name for the checkpoint's tensor ``name``; None for one that it computes itself.

        Raises ReleaseError for a tensor that the architecture has no place for.
        """
        if name.endswith(_COMPUTED) or (name == "lm_head.weight" and self.config.get("tie_word_embeddings")):
            return None
        found = _tensor_names(self.name, self.layers).get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ReleaseError(f"llama.cpp's {self.name!r} has no place for the tensor {name!r}", _NO_USE)
        return found

    def order_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The outputs of the layer ``name`` (first dimension) in the order that llama.cpp's rotation needs.

        Of queries and keys within each head, first and second half by turns; other tensors as they are.
        """
        if self.name not in _NEIGHBOURS or not name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            return rows
        heads = self.heads if name.rpartition(".")[0].endswith("q_proj") else self.key_value_heads
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)

    def describe(self, writer: GGUFWriter) -> None:
        """Write the sizes and settings of the model."""
        config = self.config
        writer.add_vocab_size(config["vocab_size"])
        writer.add_context_length(self.context)
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.key_value_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
        self._describe_rope(writer)

    def _describe_rope(self, writer: GGUFWriter) -> None:
        from gguf import RopeScalingType

        rope = _rope(self.config)
        kind = rope.get("rope_type", "default")
        if kind not in ("linear", "yarn"):
            return  # llama3's are factors in a tensor: rope_factors
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or self.config["max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(int(original))
            for key, add in (
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if rope.get(key) is not None:
                    add(float(rope[key]))

    def rope_factors(self) -> torch.Tensor | None:
        """What each rotation's frequency is divided by in LLaMA 3.1's scaling, float32 (head size / 2,).

        None where the model scales otherwise. As transformers' ``_compute_llama3_parameters`` has it: long
        wavelengths by the factor, short ones not at all, and those between by a share of both.
        """
        import torch

        rope = _rope(self.config)
        if rope.get("rope_type") != "llama3":
            return None
        factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        steps = torch.arange(0, self.head_size, 2, dtype=torch.float32) / self.head_size
        wavelengths = 2 * math.pi * float(rope.get("rope_theta", 10000.0)) ** steps
        turns = rope["original_max_position_embeddings"] / wavelengths
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return 1 / ((1 - share) / factor + share)


@cache
def _tensor_names(architecture: str, layers: int) -> TensorNameMap:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind in MODEL_ARCH if MODEL_ARCH_NAMES[kind] == architecture)
    return get_tensor_name_map(kind, layers)


def read_architecture(folder: Path, config: Mapping[str, Any]) -> Architecture:
    """The architecture of the checkpoint in ``folder``, whose config.json is ``config``.

    Raises ReleaseError for a model that llama.cpp has not, or has not with these settings, or whose settings
    are incomplete.
    """
    kind = config.get("model_type")
    if kind not in _NAMES:
        raise ReleaseError(
            f"{folder}: a {kind!r} model cannot be exported to GGUF here",
            f"this knows {', '.join(_NAMES)}; {_NO_USE}",
        )
    needed = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings",
    )  # fmt: skip
    missing = [key for key in needed if not isinstance(config.get(key), int) or config[key] < 1]
    if not isinstance(config.get("rms_norm_eps"), float):
        missing.append("rms_norm_eps")
    if missing:
        raise ReleaseError(
            f"{folder / 'config.json'} does not say what {', '.join(missing)} is",
            "name the folder of a complete transformers checkpoint",
        )
    _check_settings(folder, config)
    return Architecture(_NAMES[kind], config, folder)


def _check_settings(folder: Path, config: Mapping[str, Any]) -> None:
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    odd = []
    if config.get("hidden_act", "silu") != "silu":
        odd.append(f"hidden_act {config['hidden_act']!r}")
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        odd.append("a partial_rotary_factor")
    if kind not in _ROPE_KEYS:
        odd.append(f"rope_type {kind!r}")
    else:
        known = _ROPE_KEYS[kind] | {"rope_type", "rope_theta", "partial_rotary_factor", "type"}
        odd += [f"{key} in its {kind} rope" for key in sorted(rope.keys() - known) if rope[key] is not None]
        needed = (
            _ROPE_KEYS[kind]
            - {"beta_fast", "beta_slow"}
            - ({"original_max_position_embeddings"} if kind == "yarn" else set())
        )
        odd += [f"a {kind} rope without {key}" for key in sorted(needed) if rope.get(key) is None]
    if odd:
        raise ReleaseError(f"{folder} has {', '.join(odd)}, which llama.cpp's GGUF has no word for", _NO_USE)


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the rotation, from where transformers 5 or 4 keeps them."""
    if isinstance(config.get("rope_parameters"), dict):
        return dict(config["rope_parameters"])
    scaling = config.get("rope_scaling") or {}
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") else {}
    return {"rope_type": scaling.get("type", "default"), **scaling, **theta}
