"""Through 4 bits and back: bit for bit bitsandbytes, and exactly the weights that transformers quantizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapterhub.errors import ReleaseError
from adapterhub.packaging.manifest import Quantization
from adapterhub.packaging.quantized import DENSE_MODEL_TYPES, quantized_names, through_4bit_
from adapterhub.packaging.tensors import TensorEntry


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "block"), [((64, 64), 64), ((1000, 70), 64), ((600, 1024), 128), ((3, 6), 64)]
)
def test_it_is_what_bitsandbytes_makes(kind: Any, double: bool, shape: tuple[int, int], block: int) -> None:
    from bitsandbytes import functional

    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(torch.bfloat16)
    codes, state = functional.quantize_4bit(
        weight.flatten(), blocksize=block, compress_statistics=double, quant_type=kind
    )
    expected = functional.dequantize_4bit(codes, state).view(shape)
    found = through_4bit_(weight, Quantization(type=kind, double=double, block_size=block))
    assert found is weight
    assert torch.equal(found, expected)


def test_blocks_across_rows_are_dequantized_right() -> None:
    """bitsandbytes' own CPU kernel takes the wrong scales when a row is no whole number of blocks (0.50)."""
    torch.manual_seed(0)
    weight = torch.randn(64, 96).mul(torch.logspace(-3, 0, 64)[:, None]).to(torch.bfloat16)
    found = through_4bit_(weight.clone(), Quantization(double=False))
    steps = weight.flatten().view(-1, 64).abs().amax(1, keepdim=True).float() * 0.16  # widest half gap of NF4
    assert (
        (found.flatten().view(-1, 64).float() - weight.flatten().view(-1, 64).float()).abs() <= steps
    ).all()


def test_int8_has_no_dequantized_weights() -> None:
    with pytest.raises(ReleaseError, match=r"LLM\.int8"):
        through_4bit_(torch.ones(4, 64), Quantization(type="int8"))


def test_unknown_model_types_are_refused() -> None:
    with pytest.raises(ReleaseError, match="'mixtral' model are quantized is not known"):
        quantized_names({"model_type": "mixtral"}, [])


SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_the_quantized_weights_are_the_ones_transformers_replaces(model_type: str, tied: bool) -> None:
    import bitsandbytes
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    config = AutoConfig.for_model(model_type, **SMALL, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stored = [
        TensorEntry(name, "BF16", tuple(tensor.shape), 0, 0)
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    ]
    settings = BitsAndBytesConfig(load_in_4bit=True)
    model = replace_with_bnb_linear(model, get_keys_to_not_convert(model), settings)
    replaced = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert len(replaced) >= 8
    assert quantized_names({"model_type": model_type}, stored) == replaced
