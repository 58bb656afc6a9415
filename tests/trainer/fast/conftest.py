"""Small quantized models of each architecture with an adapter whose B is not zero, in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama wide": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
    },
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2 with windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32, "num_key_value_heads": 1},
    "phi3": {"pad_token_id": 0},
    "phi3 partly rotated": {"model_type": "phi3", "pad_token_id": 0, "rope_parameters": None},
    "smollm3": {"pad_token_id": 0, "no_rope_layers": [1, 0, 1]},
}

# Those in whose layers only the linears are ours.
LINEARS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 32, "sliding_window": 7},
    "gemma3_text": {"head_dim": 32, "sliding_window": 7},
    "llama with gelu": {"model_type": "llama", "hidden_act": "gelu", "attention_bias": True},
}


@pytest.fixture(scope="session")
def architectures() -> tuple[str, ...]:
    """Their names, as ``quantized_model`` takes them."""
    return tuple(ARCHITECTURES)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture that the fast path has a layer for."""
    return str(request.param)


@pytest.fixture(params=LINEARS)
def foreign_architecture(request: pytest.FixtureRequest) -> str:
    """Some that the fast path has no layer for."""
    return str(request.param)


@pytest.fixture(scope="session")
def quantized_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``quantized_model(architecture, rank=…, dropout=…, targets=…, device=…, dtype=…, **config)`` -> a
    PeftModel.

    Each call makes it anew with the same weights: NF4, everything else and the products in ``dtype``. Further
    names are changes of the architecture's configuration, like ``hidden_size``.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from adapterhub.trainer.model import keep_codes_for_training

    folders: dict[str, Path] = {}

    def save(architecture: str, changes: dict[str, Any]) -> Path:
        settings = {**BASE, **(ARCHITECTURES | LINEARS)[architecture], **changes}
        model_type = settings.pop("model_type", architecture)
        if "partly" in architecture:
            rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            settings["rope_parameters"] = rope
        config = AutoConfig.for_model(model_type, **settings)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
            elif "proj" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp("fast")
        model.to(torch.bfloat16).save_pretrained(folder)  # so that a load in fp32 quantizes the same values
        return folder

    def build(
        architecture: str,
        *,
        rank: int = 4,
        dropout: float = 0.0,
        targets: Any = "all-linear",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> Any:
        key = f"{architecture} {config}"
        if key not in folders:
            folders[key] = save(architecture, config)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folders[key], quantization_config=quantization, dtype=dtype, device_map={"": device}
        )
        model.requires_grad_(False)
        torch.manual_seed(1)
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"
        )
        peft_model = get_peft_model(model, lora)
        keep_codes_for_training(peft_model)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
        return peft_model.train()

    return build


@pytest.fixture(scope="session")
def packed_batch() -> Callable[..., dict[str, Any]]:
    """``packed_batch(rows=2, seed=0)``: rows of 24 tokens, sequences of 9, 11 and 4 (without loss)."""
    import torch

    def make(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, BASE["vocab_size"], (rows, 24), generator=generator)
        positions = torch.cat([torch.arange(9), torch.arange(11), torch.arange(4)]).repeat(rows, 1)
        labels = ids.clone()
        labels[:, :3] = labels[:, 9:12] = labels[:, 20:] = -100
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    return make
