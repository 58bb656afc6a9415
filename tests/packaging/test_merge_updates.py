"""What an adapter can hold beside plain factors, merged beside PEFT's own merge and the live model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import read_adapter
from adapterhub.packaging.checkpoint import open_checkpoint
from adapterhub.packaging.merge import merge_adapter
from adapterhub.packaging.survival import measure_survival, weights_in, weights_of

TOKENS = torch.tensor([[1, 5, 9, 20, 2, 3, 47]])

MakeAdapter = Callable[..., Path]


def make_base(folder: Path, *, tied: bool = True, biased: bool = False, hidden: int = 32) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=48,
        tie_word_embeddings=tied,
        attention_bias=biased,
        mlp_bias=biased,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load_base(folder: Path, resize: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if resize:
        torch.manual_seed(9)
        model.resize_token_embeddings(resize)
    return model.eval()


def make_adapter(base: Path, folder: Path, *, resize: int = 0, **settings: Any) -> Path:
    """An adapter made by peft, every number that it trains moved at random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"} | settings
    model = get_peft_model(load_base(base, resize), LoraConfig(task_type="CAUSAL_LM", **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return folder


@contextmanager
def live_model(base: Path, adapter: Path, resize: int = 0) -> Iterator[Any]:
    """PEFT's model over the base in float32, where nothing but the adapter's own numbers is rounded."""
    from peft import PeftModel

    with torch.no_grad():
        yield PeftModel.from_pretrained(load_base(base, resize), adapter).eval()


# name: (settings of LoraConfig, of the base, new number of tokens, does the head stay tied)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, bool]] = {
    "DoRA": ({"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 3}}, {}, 0, True),
    "all biases": ({"bias": "all"}, {"biased": True}, 0, True),
    "biases of adapted layers": (
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        {"biased": True},
        0,
        True,
    ),
    "saved embeddings alone": ({"modules_to_save": ["embed_tokens"]}, {}, 0, False),
    "saved head alone": ({"modules_to_save": ["lm_head"]}, {}, 0, False),
    "saved head and embeddings": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"tied": False},
        0,
        False,
    ),
    "saved norms and layers": (
        {"modules_to_save": ["norm", "mlp"], "target_modules": ["q_proj"]},
        {"tied": False},
        0,
        False,
    ),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, {}, 0, True),
    "trained tokens of both": (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [3, 5]}},
        {"tied": False},
        0,
        False,
    ),
    "resized, tied": ({"target_modules": ["q_proj"]}, {}, 56, True),
    "resized, not tied": ({"target_modules": ["q_proj"]}, {"tied": False}, 56, False),
    "resized and saved": ({"modules_to_save": ["embed_tokens", "lm_head"]}, {}, 56, False),
    "factors on embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {}, 0, False),
    "factors on the head": ({"target_modules": ["lm_head", "q_proj"]}, {}, 0, False),
    "factors on both": ({"target_modules": ["lm_head", "embed_tokens"]}, {"tied": False}, 0, False),
}
# A merge of PEFT's into one of two tied tensors changes both, which the live model does not.
PEFT_MERGES_INTO_BOTH = ("factors on embeddings", "factors on the head")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_merged_checkpoint_is_the_live_model(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    settings, of_base, resize, tied = CASES[name]
    base = make_base(tmp_path / "base", **of_base)
    adapter = make_adapter(base, tmp_path / "adapter", resize=resize, **settings)
    out = tmp_path / "out"
    merge_adapter(adapter, base, out, onto="original")
    merged, said = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(said.values()), said
    assert (merged.config.tie_word_embeddings, merged.config.vocab_size) == (tied, resize or 48)
    found = load_file(out / "model.safetensors")
    with live_model(base, adapter, resize) as live:
        expected, plain = live(TOKENS).logits, load_base(base, resize)(TOKENS).logits
        # Only the rounding of the sum to bfloat16 lies between them.
        assert (merged(TOKENS).logits - expected).norm() < 0.02 * (expected - plain).norm()
        if name in PEFT_MERGES_INTO_BOTH:
            return
        theirs = live.merge_and_unload().state_dict()
    for key, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), theirs[key].float(), rtol=2**-8, atol=0)


def test_the_update_of_a_tied_head_survives(tiny_base: Path, tmp_path: Path) -> None:
    """The head that the update is added to is no tensor of the base's own."""
    adapter = make_adapter(tiny_base, tmp_path / "adapter", target_modules=["lm_head"])
    merge_adapter(adapter, tiny_base, tmp_path / "out", onto="original")
    found = read_adapter(adapter)
    before, after = weights_of(open_checkpoint(tiny_base), found), weights_in(load_base(tmp_path / "out"))
    assert measure_survival(found, before, after) == pytest.approx(1, abs=1e-2)


def test_a_tied_head_is_untied_where_only_the_embeddings_change(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"], use_rslora=True
    )
    merge_adapter(adapter, base, tmp_path / "out", onto="original")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    embeddings, factors = "model.embed_tokens.weight", load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(after["lm_head.weight"], before[embeddings])
    a, b = (factors[f"base_model.model.model.embed_tokens.lora_embedding_{side}"] for side in "AB")
    expected = before[embeddings].float() + (b @ a).T * (3 / 2**0.5)
    torch.testing.assert_close(after[embeddings], expected.to(torch.bfloat16), rtol=2**-8, atol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert after.keys() == {*before, "lm_head.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_what_is_saved_whole_is_quantized_like_the_others(tmp_path: Path, storage: Any) -> None:
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", biased=True, hidden=64)
    adapter = make_adapter(
        base,
        tmp_path / "adapter",
        bias="all",
        modules_to_save=["lm_head", "o_proj"],
        target_modules=["q_proj", "up_proj"],
    )
    merge_adapter(adapter, base, tmp_path / "out", onto="trained", storage=storage)
    model, said = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said.values()), said
    saved = load_file(adapter / "adapter_model.safetensors")
    torch.testing.assert_close(
        model.lm_head.weight, saved["base_model.model.lm_head.weight"].to(torch.bfloat16), rtol=0, atol=0
    )
    layer, name = model.model.layers[0].self_attn.o_proj, "model.layers.0.self_attn.o_proj"
    expected = saved[f"base_model.model.{name}.weight"]
    if storage == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        found = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        found = layer.weight.data * (layer.weight.SCB / 127).unsqueeze(1)
    assert (found.float() - expected).norm() < 0.12 * expected.norm()


@pytest.mark.slow
def test_layers_of_both_ways_round_are_told_by_their_class(tmp_path: Path) -> None:
    """With a head among the targets PEFT saves fan_in_fan_out as false; a square weight does not show it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, tie_word_embeddings=False
    )
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(base)
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "lm_head"], fan_in_fan_out=True
    )
    assert read_adapter(adapter).config.fan_in_fan_out is False
    merge_adapter(adapter, base, tmp_path / "out", onto="original")
    found, kept = load_file(tmp_path / "out" / "model.safetensors"), []
    with live_model(base, adapter) as live:
        for before in (weights_in(live), weights_of(open_checkpoint(base), read_adapter(adapter))):
            after = weights_in(load_base(tmp_path / "out"))
            kept.append(measure_survival(read_adapter(adapter), before, after))
        theirs = live.merge_and_unload().state_dict()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor.float(), theirs[key].to(torch.bfloat16).float(), rtol=2**-7, atol=0)
    assert kept == pytest.approx([1, 1], abs=1e-2)


def test_the_setting_counts_for_nothing_on_a_linear_layer(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    turned = edit(tiny_adapter, tmp_path / "turned", {"fan_in_fan_out": True}, {})
    for name, adapter in (("turned", turned), ("plain", tiny_adapter)):
        merge_adapter(adapter, tiny_base, tmp_path / f"{name}-out", onto="original")
    turned_out, plain_out = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("turned-out", "plain-out")
    )
    assert turned_out == plain_out


@pytest.mark.slow
def test_dora_on_layers_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(base)
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True
    )
    merge_adapter(adapter, base, tmp_path / "out", onto="original")
    found = load_file(tmp_path / "out" / "model.safetensors")
    with live_model(base, adapter) as live:
        theirs = live.merge_and_unload().state_dict()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor.float(), theirs[key].to(torch.bfloat16).float(), rtol=2**-7, atol=0)


@pytest.mark.slow
def test_fused_experts_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    base = tmp_path / "mixtral"
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=48,
        num_local_experts=3,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    adapter = make_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    named = r"mlp\.experts\.down_proj, mlp\.experts\.gate_up_proj"
    with pytest.raises(ReleaseError, match=rf"target_parameters \({named}\), .*fuses"):
        merge_adapter(adapter, base, tmp_path / "out", onto="original")
    assert not (tmp_path / "out").exists()


def edit(adapter: Path, target: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A copy of an adapter with other settings and tensors; None removes one."""
    target.mkdir()
    settings = json.loads((adapter / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(settings))
    kept = load_file(adapter / "adapter_model.safetensors") | tensors
    save_file(
        {name: tensor for name, tensor in kept.items() if tensor is not None},
        target / "adapter_model.safetensors",
    )
    return target


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"target_modules": ["q_proj", "wq"]}, {}, "names modules that its tensors have nothing for: wq"),
        ({"modules_to_save": ["score"]}, {}, "nothing for: score"),
        ({"trainable_token_indices": [1, 2]}, {}, "nothing for: the tokens of trainable_token_indices"),
        ({"use_dora": True}, {}, "do not belong together"),
        ({}, {f"{LAYER}.lora_magnitude_vector": torch.ones(3)}, "DoRA has .3. lengths for 64 rows"),
        ({}, {f"{LAYER}.weight": torch.ones(64, 64)}, "does not explain"),
        (
            {},
            {"base_model.model.model.embed_tokens.weight": torch.ones(8, 63)},
            r"and \[8, 63\] in the adapter",
        ),
        (
            {"modules_to_save": ["q_proj"]},
            {f"{LAYER}.weight": torch.ones(65, 64)},
            r"and \[65, 64\] in the adapter",
        ),
        ({"bias": "all"}, {f"{LAYER}.base_layer.bias": torch.ones(64)}, "match no weight .*q_proj.bias"),
        (
            {"trainable_token_indices": [1, 9999]},
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 64)},
            "not what trainable_token_indices says",
        ),
        (
            {},
            {
                "base_model.model.lm_head.weight": torch.ones(9, 64),
                "base_model.model.model.embed_tokens.weight": torch.ones(8, 64),
            },
            "would have 8 and 9 rows",
        ),
    ],
)
def test_what_fits_nothing_is_refused(
    tiny_base: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    config: dict[str, Any],
    tensors: dict[str, Any],
    words: str,
) -> None:
    adapter = edit(tiny_adapter, tmp_path / "adapter", config, tensors)
    with pytest.raises(ReleaseError, match=words):
        merge_adapter(adapter, tiny_base, tmp_path / "out", onto="original")
    assert not list(tmp_path.glob("*out*"))


def test_an_adapter_of_expert_parameters_can_still_be_read(tiny_adapter: Path, tmp_path: Path) -> None:
    experts = "base_model.model.model.layers.0.mlp.experts"
    adapter = edit(
        tiny_adapter,
        tmp_path / "adapter",
        {"target_parameters": ["mlp.experts.down_proj"]},
        {f"{experts}.lora_A.weight": torch.ones(12, 64), f"{experts}.lora_B.weight": torch.ones(64, 12)},
    )
    found = read_adapter(adapter)
    assert found.pairs == {}
    assert found.config.obstacles()[0].startswith("target_parameters")
