"""``merge --to nf4|fp4|int8``: checkpoints that stock transformers loads with plain from_pretrained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapterhub.errors import ReleaseError
from adapterhub.packaging.inspection import inspect_folder
from adapterhub.packaging.layout import Storage
from adapterhub.packaging.merge import Onto, merge_adapter
from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]

LAYER = "model.layers.0.self_attn.v_proj"


def exact_sum(base: Path, adapter: Path, module: str) -> torch.Tensor:
    """W + s·B·A in float32 of a module that nothing else went through."""
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].float() for side in "AB")
    return load_file(base / "model.safetensors")[f"{module}.weight"].float() + (b @ a) * 2


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return model.eval(), said


@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_4_bits_are_those_of_bitsandbytes(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, storage: Storage
) -> None:
    from bitsandbytes import functional as bnb

    out = tmp_path / "out"
    report = merge_adapter(tiny_adapter, tiny_base, out, onto="original", storage=storage)
    assert (report.quantized, report.merged) == (14, 14)
    model, said = load(out)
    assert not any(said.values()), said
    weight = model.get_submodule(LAYER).weight
    codes, state = bnb.quantize_4bit(
        exact_sum(tiny_base, tiny_adapter, LAYER).to("cpu"), quant_type=storage, compress_statistics=True
    )
    assert torch.equal(weight.data, codes)
    found = weight.quant_state
    assert (found.quant_type, found.blocksize, found.nested, found.dtype) == (
        storage,
        64,
        True,
        torch.bfloat16,
    )
    assert found.shape == (32, 64)
    assert torch.equal(found.absmax, state.absmax)
    assert torch.equal(found.code, state.code)
    assert torch.equal(found.state2.absmax, state.state2.absmax)
    assert float(found.offset) == pytest.approx(float(state.offset), rel=1e-6)
    expected = bnb.dequantize_4bit(codes, state)
    assert torch.allclose(bnb.dequantize_4bit(weight.data, found).float(), expected, rtol=1e-2, atol=1e-3)
    embeddings = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embeddings, load_file(tiny_base / "model.safetensors")["model.embed_tokens.weight"])


def test_8_bits_are_those_of_bitsandbytes(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    from bitsandbytes import functional as bnb

    out = tmp_path / "out"
    merge_adapter(tiny_adapter, tiny_base, out, onto="original", storage="int8")
    model, said = load(out)
    assert not any(said.values()), said
    weight = model.get_submodule(LAYER).weight
    codes, scales, _outliers = bnb.int8_vectorwise_quant(exact_sum(tiny_base, tiny_adapter, LAYER))
    assert torch.equal(weight.CB if weight.CB is not None else weight.data, codes)
    assert torch.equal(weight.SCB, scales)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("onto", ["original", "trained"])
def test_what_is_stored_is_the_bf16_merge_quantized(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, onto: Onto
) -> None:
    """Rounded once: within a step of what quantizing the rounded checkpoint gives, and nearer to the sum."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    merge_adapter(tiny_adapter, tiny_base, tmp_path / "bf16", onto=onto)
    merge_adapter(tiny_adapter, tiny_base, tmp_path / "nf4", onto=onto, storage="nf4")
    twice = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bf16",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    model, _said = load(tmp_path / "nf4")
    same = [
        (ours.data == theirs.get_parameter(name).data).float().mean().item()
        for theirs in [twice]
        for name, ours in model.named_parameters()
        if ours.dtype == torch.uint8
    ]
    assert len(same) == 14
    assert min(same) > 0.97


def test_the_bytes_do_not_depend_on_threads(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        merge_adapter(
            tiny_adapter, tiny_base, tmp_path / str(threads), onto="trained", storage="nf4", threads=threads
        )
    name = "model.safetensors"
    assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_of_a_sharded_base_whose_rows_end_inside_a_block(tmp_path: Path, tiny_adapter: Path) -> None:
    """96 columns: a block of 64 spans rows."""
    from bitsandbytes import functional as bnb
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from adapterhub.trainer.model import load_base

    torch.manual_seed(0)
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=50
        )
    )
    model.to(torch.bfloat16).save_pretrained(base, max_shard_size="40KB")
    assert (base / "model.safetensors.index.json").is_file()
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    merge_adapter(adapter, base, out, onto="original", storage="nf4")
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    tensors = [load_file(path) for path in sorted(out.glob("*.safetensors"))]
    assert index["weight_map"].keys() == {name for file in tensors for name in file}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for f in tensors for t in f.values())
    merged, said = load(out)
    assert not any(said.values()), said
    # bitsandbytes 0.50 on the CPU neither runs such rows nor dequantizes them right but when they are flat.
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    weight = merged.get_submodule("model.layers.2.mlp.down_proj").weight
    expected = plain.get_submodule("model.layers.2.mlp.down_proj").weight.float()
    state = weight.quant_state
    state.shape = torch.Size([expected.numel()])
    found = bnb.dequantize_4bit(weight.data, state).float().view(expected.shape)
    assert (found - expected).norm() < 0.11 * expected.norm()
    with pytest.raises(ReleaseError, match="96 inputs, no multiple of 64"):
        load_base(out, None, "cpu")


@pytest.mark.slow
def test_a_quantized_release_loads_and_is_measured(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    from adapterhub import load_adapter

    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("What is the capital of France? The capital of France is Paris.", encoding="utf-8")
    args = ("--to", "nf4", "--onto", "trained", "--base", tiny_base, "--out", out, "--json")
    code, printed, _err = run_cli("merge", tiny_release, *args)
    assert code == 0
    said = json.loads(printed)
    assert (said["to"], said["quantized"], said["release"]["name"]) == ("nf4", 14, "tiny-orders-nf4")
    manifest = Release.open(out).manifest
    assert (manifest.kind, manifest.merge and manifest.merge.dtype) == ("quantized", "nf4")
    plain = load_file(tiny_base / "model.safetensors").values()
    assert inspect_folder(out).parameters == sum(tensor.numel() for tensor in plain)
    model, tokenizer = load_adapter(out)
    inputs = tokenizer("The capital", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]
    code, printed, _err = run_cli(
        "fidelity", tiny_release, out, "--text", text, "--base", tiny_base, "--json"
    )
    assert code == 0
    assert 0 < json.loads(printed)["delta_survival"] < 1.5
    assert run_cli("card", out)[0] == 0
    assert "held in 4 bits (NF4, double quantization)" in (out / "README.md").read_text(encoding="utf-8")


def test_a_model_whose_linear_layers_are_not_known_is_refused(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_bytes()) | {"model_type": "mixtral"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ReleaseError, match="'mixtral' model"):
        merge_adapter(tiny_adapter, base, tmp_path / "out", onto="original", storage="nf4")
    assert not (tmp_path / "out").exists()
