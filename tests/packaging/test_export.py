"""What is exported to GGUF is read back with gguf's own reader and held against its source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFValueType, quants
from safetensors.torch import load_file, save_file

from adapterhub.errors import BaseMismatchError, ReleaseError
from adapterhub.packaging.export.adapter import export_adapter
from adapterhub.packaging.export.architecture import read_architecture
from adapterhub.packaging.export.model import export_model
from adapterhub.packaging.export.vocabulary import read_vocabulary
from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]

GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {**GPT_2, "use_regex": False}
LLAMA_3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata of a GGUF file, and its tensors in float32 the way round that torch has them."""
    reader = GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return values, tensors


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """First and second half of each head's rows by turns."""
    size = rows.shape[0] // heads
    order = [
        head * size + half * size // 2 + place
        for head in range(heads)
        for place in range(size // 2)
        for half in range(2)
    ]
    return rows[order]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def change(folder: Path, name: str, **keys: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | keys))


@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "q8_0"])
def test_a_model_read_back_is_the_checkpoint(tiny_base: Path, tmp_path: Path, form: Any) -> None:
    made = export_model(tiny_base, tmp_path / "model.gguf", form)
    values, tensors = read(made.out)
    source = {name: tensor.float() for name, tensor in load_file(tiny_base / "model.safetensors").items()}
    assert len(tensors) == len(source) == made.tensors
    loss = {"f16": 1e-3, "q8_0": 2e-2}.get(form, 0)
    for ours, theirs, heads in (
        ("token_embd.weight", "model.embed_tokens.weight", 0),
        ("output_norm.weight", "model.norm.weight", 0),
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", 4),
        ("blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight", 2),
        ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight", 0),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", 0),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight", 0),
    ):
        expected = interleave(source[theirs], heads) if heads else source[theirs]
        torch.testing.assert_close(tensors[ours], expected, rtol=0, atol=loss * float(expected.abs().max()))
    assert values["general.architecture"] == "llama"
    assert values["llama.attention.head_count_kv"] == 2
    assert values["llama.rope.freq_base"] == 10000.0
    assert values["llama.context_length"] == 512
    assert values["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[form]


def test_the_tokenizer_goes_along(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    values, _tensors = read(export_model(tiny_base, tmp_path / "model.gguf").out)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert values["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    merges = json.loads((tiny_base / "tokenizer.json").read_text())["model"]["merges"]
    assert values["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_an_adapter_read_back_is_its_factors(tiny_release: Path, tiny_base: Path, tmp_path: Path) -> None:
    made = export_adapter(tiny_release, tiny_base, tmp_path / "lora.gguf")
    values, tensors = read(made.out)
    source = load_file(tiny_release / "adapter_model.safetensors")
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == 8
    assert values["adapterhub.release.manifest_sha256"] == Release.open(tiny_release).digest
    assert len(tensors) == len(source)
    for ours, theirs, heads in (("attn_q", "self_attn.q_proj", 4), ("ffn_up", "mlp.up_proj", 0)):
        a = source[f"base_model.model.model.layers.0.{theirs}.lora_A.weight"]
        b = source[f"base_model.model.model.layers.0.{theirs}.lora_B.weight"]
        assert torch.equal(tensors[f"blk.0.{ours}.weight.lora_a"], a)
        expected = interleave(b, heads) if heads else b
        assert torch.equal(tensors[f"blk.0.{ours}.weight.lora_b"], expected)


def test_scales_of_their_own_are_in_the_factors(tiny_adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    """llama.cpp knows one alpha, and divides it by each module's rank."""
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "patterns"))
    change(adapter, "adapter_config.json", use_rslora=True, alpha_pattern={"up_proj": 3})
    values, tensors = read(export_adapter(adapter, tiny_base, tmp_path / "lora.gguf").out)
    source = load_file(adapter / "adapter_model.safetensors")
    for ours, theirs, alpha in (("ffn_up", "mlp.up_proj", 3), ("attn_v", "self_attn.v_proj", 8)):
        name = f"base_model.model.model.layers.0.{theirs}.lora"
        expected = alpha / 2 * source[f"{name}_B.weight"] @ source[f"{name}_A.weight"]  # rank 4: s = alpha/√4
        a, b = (tensors[f"blk.0.{ours}.weight.lora_{side}"] for side in "ab")
        torch.testing.assert_close(values["adapter.lora.alpha"] / a.shape[0] * b @ a, expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "gpt2"}, "'gpt2' model cannot be exported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale in its yarn rope"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear rope without factor"),
        ({"num_hidden_layers": 3}, "nothing for llama.cpp's 'blk.2.attn_q.weight'"),
        ({"num_hidden_layers": 1}, "no place for the tensor 'model.layers.1"),
        ({"vocab_size": None}, "does not say what vocab_size"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantized already"),
    ],
)
def test_what_llama_cpp_has_no_word_for_is_refused(base: Path, settings: dict, words: str) -> None:
    change(base, "config.json", **settings)
    with pytest.raises(ReleaseError, match=words.replace("(", "\\(")):
        export_model(base, base.parent / "model.gguf")
    assert [path.name for path in base.parent.iterdir()] == ["base"]


def test_values_beyond_float16_are_refused_and_leave_no_file(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ReleaseError, match=r"beyond what float16 has"):
        export_model(base, base.parent / "model.gguf")
    assert [path.name for path in base.parent.iterdir()] == ["base"]
    assert export_model(base, base.parent / "model.gguf", "bf16").size


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([GPT_2], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, GPT_2], "smollm"),
        (
            [
                {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False},
                BYTES,
            ],
            "llama-bpe",
        ),
        (
            [
                {
                    "type": "Split",
                    "pattern": {"Regex": LLAMA_3.replace("{1,3}", "")},
                    "behavior": "Isolated",
                    "invert": False,
                },
                BYTES,
            ],
            "qwen2",
        ),
        ([{"type": "Whitespace"}], None),
        ([{"type": "Digits", "individual_digits": False}, GPT_2], None),
        ([{**GPT_2, "add_prefix_space": True}], None),
    ],
)
def test_a_tokenizer_is_known_by_what_it_does(base: Path, steps: list, name: str | None) -> None:
    change(base, "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    if name is None:
        with pytest.raises(ReleaseError, match="splits text in a way"):
            read_vocabulary(base, 384)
    else:
        assert read_vocabulary(base, 384).splitter == name


def test_embeddings_beyond_the_tokenizer_are_unused_tokens(base: Path) -> None:
    vocabulary = read_vocabulary(base, 386)
    assert list(vocabulary.tokens[-2:]) == ["[PAD384]", "[PAD385]"]
    assert list(vocabulary.kinds[-2:]) == [5, 5]
    with pytest.raises(ReleaseError, match="the token 383, and the model embeddings for 383"):
        read_vocabulary(base, 383)


def test_pieces_are_merged_in_sentencepieces_order(base: Path) -> None:
    """A LLaMA 2 tokenizer: bytes as a last resort, a space before a text, scores by the order of merges."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    special = [
        {"id": number, "content": pieces[number], "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for number in range(3)
    ]  # fmt: skip
    change(
        base,
        "tokenizer.json",
        added_tokens=special,
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        pre_tokenizer=None,
        post_processor=None,
        decoder=None,
        model={
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": [["▁", "a"], ["a", "b"]],
        },
    )  # fmt: skip
    change(
        base, "tokenizer_config.json", bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=None
    )
    found = read_vocabulary(base, 264)
    assert (found.model, found.splitter, found.adds["space"]) == ("llama", "default", True)
    assert list(found.kinds[:4]) == [2, 3, 3, 6]
    assert found.scores[pieces.index("▁a")] > found.scores[pieces.index("ab")] > found.scores[260]


def test_llama_3_rotates_as_transformers_does(tiny_base: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    frequencies, _factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    found = read_architecture(tiny_base, config.to_dict()).rope_factors()
    assert found is not None
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / found, frequencies)


def test_a_sliding_window_bounds_the_context(tiny_base: Path) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    mistral = read_architecture(tiny_base, config | {"model_type": "mistral", "sliding_window": 64})
    assert (mistral.name, mistral.context, mistral.slides) == ("llama", 64, True)
    qwen = read_architecture(tiny_base, config | {"model_type": "qwen2", "sliding_window": 64})
    assert (qwen.name, qwen.context, qwen.slides) == ("qwen2", 512, False)
    rows = torch.arange(8.0).view(8, 1)
    assert torch.equal(qwen.order_rows("model.layers.0.self_attn.q_proj.weight", rows), rows)


def test_a_lora_holds_no_dora(tiny_adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "dora"))
    change(adapter, "adapter_config.json", use_dora=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in list(tensors.items()):
        if name.endswith("lora_B.weight"):
            key = name.replace("lora_B.weight", "lora_magnitude_vector.weight")
            tensors[key] = torch.ones(tensor.shape[0])
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ReleaseError, match="DoRA's lengths"):
        export_adapter(adapter, tiny_base, tmp_path / "lora.gguf")


def test_another_base_is_refused(tiny_release: Path, base: Path) -> None:
    change(base, "config.json", rms_norm_eps=1e-3)
    with pytest.raises(BaseMismatchError):
        export_adapter(tiny_release, base, base.parent / "lora.gguf")


def test_the_command_names_the_file_and_says_how_to_run_it(
    tiny_release: Path, tiny_base: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli("export", tiny_release, "--to", "gguf", "--base", tiny_base)
    assert code == 0, err
    assert "--lora tiny-orders-0.1.0-lora.gguf" in out
    assert GGUFReader("tiny-orders-0.1.0-lora.gguf").fields["general.type"].types == [GGUFValueType.STRING]
    code, _out, err = run_cli("export", tiny_release, "--to", "gguf", "--base", tiny_base)
    assert (code, "exists already" in err) == (3, True)
    code, _out, err = run_cli(
        "export", tiny_release, "--to", "gguf", "--base", tiny_base, "--out", tiny_release / "x.gguf"
    )
    assert (code, "lies inside the release" in err) == (3, True)
    code, _out, err = run_cli("export", tiny_release, "--to", "gguf", "--type", "q8_0")
    assert (code, "an adapter is not stored as q8_0" in err) == (2, True)
    code, _out, err = run_cli("export", tiny_release, "--to", "gguf", "--base", "nowhere", "--out", "x.gguf")
    assert (code, "there is no folder nowhere here" in err) == (5, True)
    code, out, err = run_cli("export", tiny_base, "--to", "gguf", "--type", "q8_0", "--json")
    assert (code, json.loads(out)["type"]) == (0, "q8_0")
