"""Shapes against the published totals, and against transformers' own models built without memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.errors import RecipeError
from adapterhub.trainer.placement import place_adapter
from adapterhub.trainer.recipe import LoraSection
from adapterhub.trainer.shapes import read_shape, shape_of


def llama(
    hidden: int, layers: int, heads: int, intermediate: int, vocab: int = 32000, **more: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "llama", **sizes, "intermediate_size": intermediate, "vocab_size": vocab, **more}


# Parameter counts as the model's own safetensors index or paper states them.
PUBLISHED = {
    "llama-2-7b": (llama(4096, 32, 32, 11008), 6_738_415_616),
    "llama-2-13b": (llama(5120, 40, 40, 13824), 13_015_864_320),
    "llama-33b": (llama(6656, 60, 52, 17920), 32_528_943_616),
    "llama-65b": (llama(8192, 80, 64, 22016), 65_285_660_672),
    "llama-3-8b": (llama(4096, 32, 32, 14336, 128256, num_key_value_heads=8), 8_030_261_248),
    "llama-3-70b": (llama(8192, 80, 64, 28672, 128256, num_key_value_heads=8), 70_553_706_496),
    "smollm2-135m": (
        llama(576, 30, 9, 1536, 49152, num_key_value_heads=3, tie_word_embeddings=True), 134_515_008,
    ),
    "smollm3-3b": (
        {**llama(2048, 36, 16, 11008, 128256, num_key_value_heads=4), "model_type": "smollm3"}, 3_075_098_624,
    ),
    "mistral-7b": (
        {**llama(4096, 32, 32, 14336, num_key_value_heads=8), "model_type": "mistral"}, 7_241_732_096,
    ),
    "qwen2.5-7b": (
        {**llama(3584, 28, 28, 18944, 152064, num_key_value_heads=4), "model_type": "qwen2"}, 7_615_616_512,
    ),
    "qwen3-8b": (
        {**llama(4096, 36, 32, 12288, 151936, num_key_value_heads=8, head_dim=128), "model_type": "qwen3"},
        8_190_735_360,
    ),
    "gemma-2-9b": (
        {**llama(3584, 42, 16, 14336, 256000, num_key_value_heads=8, head_dim=256), "model_type": "gemma2"},
        9_241_705_984,
    ),
    "gemma-3-1b": (
        {
            **llama(1152, 26, 4, 6912, 262144, num_key_value_heads=1, head_dim=256),
            "model_type": "gemma3_text",
        },
        999_885_952,
    ),
    "gemma-3-4b": (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                "num_hidden_layers": 34,
            },
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14,
                "image_size": 896, "vision_use_head": False,
            },
        },
        4_300_079_472,
    ),
    "phi-3-mini": ({**llama(3072, 32, 32, 8192, 32064), "model_type": "phi3"}, 3_821_079_552),
    "phi-4": (
        {**llama(5120, 40, 40, 17920, 100352, num_key_value_heads=10), "model_type": "phi3"}, 14_659_507_200,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    config, published = PUBLISHED[name]
    assert shape_of(config).parameters == published


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_those_that_transformers_builds(name: str, tmp_path: Path) -> None:
    """At their own size, on the meta device, by way of the config.json that transformers writes for them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given, published = PUBLISHED[name]
    arguments = {key: value for key, value in given.items() if key != "model_type"}
    if given["model_type"] in ("phi3", "smollm3"):  # their default is beyond the tests' vocabularies
        arguments["pad_token_id"] = 0
    config = AutoConfig.for_model(given["model_type"], **arguments)
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path / "config.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters()) == published
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - {"lm_head"} == {name for name, _linear, _layer in shape.modules()}


SMALL = {
    "llama": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "mistral": {"num_key_value_heads": 2, "head_dim": 24},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True},
    "gemma": {"num_key_value_heads": 1, "head_dim": 24},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 24},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 24},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gemma3": {},
}


def small_config(model_type: str) -> dict[str, Any]:
    text = {**llama(64, 3, 4, 96, 512), "model_type": model_type, **SMALL[model_type]}
    if model_type != "gemma3":
        return text
    inner = {**llama(64, 2, 4, 96, 512, num_key_value_heads=2, head_dim=16), "model_type": "gemma3_text"}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
    }  # fmt: skip
    return {"model_type": "gemma3", "text_config": inner, "vision_config": vision}


@pytest.mark.parametrize("model_type", SMALL)
def test_linears_and_totals_are_those_of_transformers(model_type: str) -> None:
    """Against ``from_config`` on the meta device: every parameter, and every linear module's name, size and
    bias.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = small_config(model_type)
    with torch.device("meta"):
        arguments = {key: value for key, value in config.items() if key != "model_type"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **arguments))
    shape = shape_of(config)

    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    real = {
        (path, module.in_features, module.out_features, module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
        for path in [name.split(".layers.")[1].split(".", 1)[1]]
    }
    ours = {
        (linear.path, linear.inputs, linear.outputs, linear.bias) for linear in (*shape.linears, *shape.tower)
    }
    assert ours == real


def test_a_missing_kv_head_count_means_one_for_each_head() -> None:
    assert shape_of(llama(64, 2, 4, 96)).kv_heads == 4
    assert shape_of(llama(64, 2, 4, 96, num_key_value_heads=None)).kv_heads == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba2"}, "mamba2"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({"model_type": None}, "None"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": True}, "vocab_size"),
        ({"model_type": "gemma3"}, "text_config"),
    ],
)
def test_what_cannot_be_planned_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        shape_of({**llama(64, 2, 4, 96), **change})


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"model_type": []}'])
def test_a_malformed_file_is_a_recipe_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(RecipeError):
        read_shape(path)


def test_targets_match_as_peft_matches_them(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(llama(64, 2, 4, 96)))
    shape = read_shape(path)

    def placed(**lora: Any) -> list[tuple[int | None, str, int]]:
        found = place_adapter(shape, LoraSection(rank=2, **lora))
        return [(where.layer, where.linear.path, where.rank) for where in found]

    assert len(placed()) == 14
    assert placed(target_modules=("layers.1.self_attn.q_proj", "mlp.down_proj")) == [
        (0, "mlp.down_proj", 2), (1, "self_attn.q_proj", 2), (1, "mlp.down_proj", 2),
    ]  # fmt: skip
    assert placed(target_modules=r".*1\.self_attn\.[qv]_proj", rank_pattern={"v_proj": 8}) == [
        (1, "self_attn.q_proj", 2), (1, "self_attn.v_proj", 8),
    ]  # fmt: skip
    for wrong in (
        {"target_modules": ("q_proj", "proj_q")},
        {"target_modules": "proj_q"},
        {"rank_pattern": {"proj_q": 3}},
        {"target_modules": ("v_proj",), "alpha_pattern": {"proj_q": 3}},
    ):
        with pytest.raises(RecipeError, match="proj_q"):
            placed(**wrong)
