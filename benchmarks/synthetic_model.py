"""LLaMA models of any size, and two of Gemma's, with random weights, made in 4 bits where they are to run.

No 16-bit checkpoint ever exists: every linear is given random NF4 codes and doubly quantized scales as
bitsandbytes lays them out, so that a 65B takes 35 GB and seconds. Speed and memory do not depend on what the
weights are, only on their being no constants; the spread is that of a trained model, so nothing overflows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from adapterhub.trainer.shapes import ModelShape

VOCABULARY = 32000
# hidden, layers, heads, intermediate (Touvron et al. 2023).
SIZES = {
    "7B": (4096, 32, 32, 11008),
    "13B": (5120, 40, 40, 13824),
    "33B": (6656, 60, 52, 17920),
    "65B": (8192, 80, 64, 22016),
    "tiny": (256, 3, 4, 512),
}
# What their published config.json says (Riviere et al. 2024, Gemma 3 report 2025): no hand-written layers.
GEMMAS: dict[str, dict[str, Any]] = {
    "Gemma 2 9B": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "intermediate_size": 14336,
        "vocab_size": 256000,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma 3 1B": {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 6912,
        "vocab_size": 262144,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
    },
}
MODELS = (*SIZES, *GEMMAS)
_BLOCK = 64
_SCALE_BLOCK = 256
_SPREAD = 0.02


def config_of(size: str) -> dict[str, Any]:
    """config.json's content for one of ``MODELS``."""
    if size in GEMMAS:
        both = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
        return {**GEMMAS[size], **both, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    hidden, layers, heads, intermediate = SIZES[size]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": intermediate,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def shape_of_size(size: str) -> ModelShape:
    """The planner's shape for one of ``MODELS``."""
    from adapterhub.trainer.shapes import shape_of

    return shape_of(config_of(size))


def synthetic_model(size: str, device: torch.device) -> Any:
    """A causal model of transformers on ``device``: linears in NF4, the rest in bf16, all frozen.

    The same weights for the same size and device, whoever asks.
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**config_of(size))
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            with torch.device("meta"):
                linear = Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
            _fill(linear, device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            parent, _, child = name.rpartition(".")
            if "norm" not in name:
                value.normal_(std=_SPREAD)
            setattr(model.get_submodule(parent), child, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    if size in GEMMAS:  # its embeddings are multiplied by a number that is kept as a buffer
        model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5, device=device)
    model.is_loaded_in_4bit = True
    return model


def _fill(linear: Any, device: torch.device) -> None:
    """Give a ``Linear4bit`` random codes and scales."""
    from bitsandbytes.backends.utils import CODE
    from bitsandbytes.functional import QuantState, create_dynamic_map
    from bitsandbytes.nn import Params4bit

    count = linear.in_features * linear.out_features
    blocks = -(-count // _BLOCK)
    scales = QuantState(
        absmax=torch.full((-(-blocks // _SCALE_BLOCK),), _SPREAD, device=device),
        code=create_dynamic_map().to(device),
        blocksize=_SCALE_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        shape=torch.Size((linear.out_features, linear.in_features)),
        code=CODE["nf4"].to(device),
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.tensor(2 * _SPREAD, device=device),
        state2=scales,
    )
    codes = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, device=device)
    linear.weight = Params4bit(
        codes, requires_grad=False, quant_state=state, blocksize=_BLOCK, compress_statistics=True,
        quant_type="nf4", bnb_quantized=True, module=linear,
    )  # fmt: skip
    linear.quant_state = state


def random_rows(rows: int, length: int, documents: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch on the CPU: ``rows`` of ``length`` tokens, each ``documents`` sequences of equal length."""
    ids = torch.randint(3, VOCABULARY, (rows, length))
    positions = torch.arange(length // documents).repeat(documents).expand(rows, -1).contiguous()
    batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}
    return {name: value.pin_memory() for name, value in batch.items()} if device.type == "cuda" else batch
