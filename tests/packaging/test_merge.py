"""Merging beside PEFT's own merge, tensor by tensor, and everything that must not be merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub.errors import AdapterHubError, BaseMismatchError, ReleaseError, SignatureError
from adapterhub.packaging.manifest import Quantization
from adapterhub.packaging.merge import merge_adapter
from adapterhub.packaging.release import Release

MakeAdapter = Callable[..., Path]


@pytest.fixture
def make_adapter(tiny_base: Path, tmp_path: Path) -> MakeAdapter:
    """A plain PEFT adapter with random factors, made by peft with the given LoraConfig settings."""

    def make(base: Path = tiny_base, **settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(3)
        config = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        } | settings
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), LoraConfig(**config)
        )
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        return folder

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged_by_peft(
    base: Path, adapter: Path, weights_first: Callable[[Any], None] | None = None
) -> dict[str, Any]:
    """The state dict of PEFT's merge_and_unload onto the base in bfloat16, factors in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if weights_first:
        weights_first(model)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def dequantize_linears(model: Any, quantization: Quantization) -> None:
    """What transformers loads in 4 bits, put back as plain weights: every nn.Linear but the head."""
    from bitsandbytes import functional

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes, state = functional.quantize_4bit(
                module.weight.data,
                blocksize=quantization.block_size,
                compress_statistics=quantization.double,
                quant_type=quantization.type,
            )
            module.weight.data = functional.dequantize_4bit(codes, state)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name
    assert {name for name in expected if name != "lm_head.weight"} <= found.keys()


SETTINGS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "an odd scale": {"r": 3, "lora_alpha": 7},
    "rank and alpha patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 6},
        "alpha_pattern": {"k_proj": 5, "layers.0.self_attn.q_proj": 9},
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_onto_original_is_what_peft_merges(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = make_adapter(**settings)
    report = merge_adapter(adapter, tiny_base, tmp_path / "out", onto="original")
    assert_same(weights(tmp_path / "out"), merged_by_peft(tiny_base, adapter))
    assert report.merged == len(load_file(adapter / "adapter_model.safetensors")) // 2
    assert (report.requantized, report.release) == (0, None)


@pytest.mark.parametrize(
    "settings", [SETTINGS["all linear layers"], SETTINGS["some layers"]], ids=["all", "some"]
)
def test_onto_trained_is_what_peft_merges_into_the_dequantized_base(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = make_adapter(**settings)
    report = merge_adapter(adapter, tiny_base, tmp_path / "out", onto="trained")
    expected = merged_by_peft(tiny_base, adapter, lambda model: dequantize_linears(model, Quantization()))
    assert_same(weights(tmp_path / "out"), expected)
    assert report.requantized == 14
    untouched = weights(tiny_base)["model.layers.0.self_attn.v_proj.weight"]
    assert not torch.equal(weights(tmp_path / "out")["model.layers.0.self_attn.v_proj.weight"], untouched)


def test_tied_embeddings_stay_tied_and_untouched(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    for onto in ("original", "trained"):
        out = tmp_path / onto
        merge_adapter(tiny_adapter, tiny_base, out, onto=onto)
        assert "lm_head.weight" not in weights(out)
        name = "model.embed_tokens.weight"
        assert torch.equal(weights(out)[name], weights(tiny_base)[name])


def test_a_merged_release_is_a_release_that_transformers_loads(
    tiny_release: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = merge_adapter(tiny_release, tiny_base, tmp_path / "out", onto="original")
    release = Release.open(tmp_path / "out")
    release.check_files()
    adapter = Release.open(tiny_release)
    manifest = release.manifest
    assert (manifest.kind, manifest.name, manifest.version) == ("merged", "tiny-orders-merged", "0.1.0")
    assert manifest.parent is not None
    assert manifest.parent.ref == "tiny-orders@0.1.0"
    assert manifest.parent.manifest_sha256 == adapter.digest
    assert manifest.base == adapter.manifest.base
    assert manifest.merge is not None
    assert manifest.merge.onto == "original"
    assert report.release == release

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    tokens = torch.tensor([[1, 5, 9, 20]])
    plain = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, tiny_release)(tokens).logits
    assert (merged(tokens).logits - adapted).abs().max() < 0.1 * (plain - adapted).abs().max()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == (tiny_release / "chat_template.jinja").read_text()


def shard(folder: Path, target: Path) -> Path:
    """The checkpoint of ``folder`` in small shards."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(
        target, max_shard_size="60KB"
    )
    assert len(list(target.glob("*.safetensors"))) > 3
    return target


@pytest.mark.parametrize("onto", ["original", "trained"])
def test_shards_are_kept_and_threads_change_no_byte(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, onto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub.packaging.sums.PIECE_BYTES", 1000)
    base = shard(tiny_base, tmp_path / "sharded")
    for threads in (1, 2, 12):
        merge_adapter(tiny_adapter, base, tmp_path / f"out{threads}", onto=onto, threads=threads)
    names = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert {path.name for path in base.glob("*.safetensors*")} <= set(names)
    for name in names:
        contents = {(tmp_path / f"out{threads}" / name).read_bytes() for threads in (1, 2, 12)}
        assert len(contents) == 1, name
    whole = tmp_path / "whole"
    merge_adapter(tiny_adapter, tiny_base, whole, onto=onto)
    assert_same(weights(tmp_path / "out1"), weights(whole))
    index = json.loads((tmp_path / "out1" / "model.safetensors.index.json").read_text())
    assert index == json.loads((base / "model.safetensors.index.json").read_text()) | {
        "metadata": index["metadata"]
    }
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in weights(whole).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bases_in_other_dtypes_are_rounded_once_and_last(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    torch.manual_seed(5)
    noisy = {
        name: (t.float() * (1 + 1e-3 * torch.randn(t.shape))).to(dtype)
        for name, t in weights(tiny_base).items()
    }
    noisy["rotary.step"] = torch.tensor(7)
    save_file(noisy, base / "model.safetensors", {"format": "pt"})
    merge_adapter(tiny_adapter, base, tmp_path / "out", onto="original")
    found = weights(tmp_path / "out")
    factors = load_file(tiny_adapter / "adapter_model.safetensors")
    for name, tensor in found.items():
        if name == "rotary.step":
            assert tensor.dtype == torch.int64
            assert tensor.item() == 7
            continue
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = noisy[name].float()
        if f"{key}.lora_A.weight" in factors:
            expected = expected + 2.0 * (factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"])
        assert torch.equal(tensor, expected.to(torch.bfloat16)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A small GPT-2, whose linear layers are stored as (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_fan_in_fan_out(
    gpt2: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub.packaging.sums.PIECE_BYTES", 1000)
    adapter = make_adapter(gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    merge_adapter(adapter, gpt2, tmp_path / "out", onto="original")
    assert_same(weights(tmp_path / "out"), merged_by_peft(gpt2, adapter))
    with pytest.raises(ReleaseError, match="which weights of a 'gpt2' model are quantized is not known"):
        merge_adapter(adapter, gpt2, tmp_path / "trained", onto="trained")


def test_a_checkpoint_of_the_bare_model_lacks_the_first_part_of_each_name(
    gpt2: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    expected = merged_by_peft(gpt2, adapter)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights(gpt2).items()}
    save_file(bare, gpt2 / "model.safetensors", {"format": "pt"})
    merge_adapter(adapter, gpt2, tmp_path / "out", onto="original")
    assert_same(
        {f"transformer.{name}": tensor for name, tensor in weights(tmp_path / "out").items()}, expected
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "changes the base too"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ],
)
def test_what_cannot_be_merged_right_is_refused_by_name(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    adapter = make_adapter(**settings)
    with pytest.raises(ReleaseError, match=words):
        merge_adapter(adapter, tiny_base, tmp_path / "out", onto="original")
    assert not (tmp_path / "out").exists()


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(("out", ".out"))]


def edit_factors(adapter: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(adapter, target)
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    return target


PREFIX = "base_model.model.model.layers.1.mlp.up_proj"


def rename_module(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        name = f"{PREFIX}.lora_{side}.weight"
        tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PREFIX}.lora_A.weight"] = torch.zeros(4, 65)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PREFIX}.lora_B.weight"][3, 1] = torch.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            rename_module,
            r"1 of the adapter's 14 modules match no weight .*model\.layers\.7\.mlp\.up_proj\.weight",
        ),
        (widen, r"'model\.layers\.1\.mlp\.up_proj\.weight' has shape"),
        (poison, "NaN or infinite"),
    ],
)
def test_factors_that_do_not_fit_are_refused_and_nothing_is_left(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, change: Callable[..., None], words: str
) -> None:
    adapter = edit_factors(tiny_adapter, tmp_path / "bad", change)
    with pytest.raises(ReleaseError, match=words):
        merge_adapter(adapter, tiny_base, tmp_path / "out", onto="original")
    assert left_behind(tmp_path) == []


def test_another_base_is_refused_and_nothing_is_left(
    tiny_release: Path, tiny_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(BaseMismatchError, match=r"is not tiny-llama as trained on: model\.safetensors"):
        merge_adapter(tiny_release, other, tmp_path / "out", onto="original")
    (other / "config.json").write_text("{}")
    with pytest.raises(BaseMismatchError, match=r"config\.json differs"):
        merge_adapter(tiny_release, other, tmp_path / "out", onto="original")
    assert left_behind(tmp_path) == []


def test_weights_beside_the_index_belong_to_the_base(
    tiny_release: Path, tiny_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    shutil.copy(other / "model.safetensors", other / "consolidated.safetensors")
    with pytest.raises(BaseMismatchError, match="consolidated"):
        merge_adapter(tiny_release, other, tmp_path / "out", onto="original")


def test_a_changed_release_is_refused(tiny_release: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tiny_release / "tokenizer.json").write_text("{}")
    with pytest.raises(SignatureError, match=r"tokenizer\.json"):
        merge_adapter(tiny_release, tiny_base, tmp_path / "out", onto="original")


def test_a_signature_that_does_not_hold_is_refused(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """Changed after it was signed, the manifest made to agree: only the signature shows it."""
    assert run_cli("keygen", tmp_path / "keys")[0] == 0
    assert run_cli("sign", tiny_release, "--key", tmp_path / "keys" / "adapterhub.key")[0] == 0
    signature = (tiny_release / "model.sig").read_bytes()
    (tiny_release / "model.sig").unlink()
    factors = load_file(tiny_release / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in factors.items()}, tmp_path / "changed", {"format": "pt"})
    Release.open(tiny_release).with_files({"adapter_model.safetensors": (tmp_path / "changed").read_bytes()})
    (tiny_release / "model.sig").write_bytes(signature)
    Release.open(tiny_release).check_files()
    with pytest.raises(SignatureError):
        merge_adapter(tiny_release, tiny_base, tmp_path / "out", onto="original")
    arguments = ("--to", "gguf", "--base", tiny_base, "--out", tmp_path / "out.gguf")
    assert run_cli("export", tiny_release, *arguments)[0] == 4
    assert left_behind(tmp_path) == []


def test_a_merged_release_is_not_merged_again(tiny_release: Path, tiny_base: Path, tmp_path: Path) -> None:
    merge_adapter(tiny_release, tiny_base, tmp_path / "out", onto="trained")
    with pytest.raises(ReleaseError, match="of kind 'merged'"):
        merge_adapter(tmp_path / "out", tiny_base, tmp_path / "again", onto="trained")


def test_nothing_is_overwritten(tiny_adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ReleaseError, match="exists already"):
        merge_adapter(tiny_adapter, tiny_base, tmp_path / "out", onto="original")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_full_disk_is_said_before_and_during_the_work(
    tiny_adapter: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def no_room(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            "adapterhub.packaging.writing.shutil.disk_usage", lambda _path: shutil._ntuple_diskusage(9, 9, 0)
        )
        with pytest.raises(OSError, match=r"No space left on device: \d+ bytes"):
            merge_adapter(tiny_adapter, tiny_base, tmp_path / "out", onto="original")
    with monkeypatch.context() as patch:
        patch.setattr("adapterhub.packaging.writing.write_companions", no_room)
        with pytest.raises(OSError, match="No space left"):
            merge_adapter(tiny_adapter, tiny_base, tmp_path / "out", onto="original")
    assert left_behind(tmp_path) == []


def test_a_shard_that_cannot_be_read_stops_the_others(
    tiny_adapter: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shard(tiny_base, tmp_path / "sharded")
    last = sorted(base.glob("*.safetensors"))[-1]

    def shrink(done: int, _all: int) -> None:
        last.write_bytes(last.read_bytes()[:-50])

    with pytest.raises(AdapterHubError, match="ended while it was read"):
        merge_adapter(tiny_adapter, base, tmp_path / "out", onto="original", threads=1, progress=shrink)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("shards", "left"), [(False, []), (True, [".out.partial"])])
def test_an_interrupt_leaves_at_most_finished_shards(
    tiny_adapter: Path, tiny_base: Path, tmp_path: Path, shards: bool, left: list[str]
) -> None:
    import os
    import signal
    import time

    base = shard(tiny_base, tmp_path / "sharded") if shards else tiny_base
    signals = iter([signal.SIGINT])

    def interrupt_once(_done: int, _all: int) -> None:
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # while the main thread hears of it

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            merge_adapter(tiny_adapter, base, tmp_path / "out", onto="original", progress=interrupt_once)
    finally:
        signal.signal(signal.SIGINT, before)
    assert left_behind(tmp_path) in ([], left)  # with shards it is a matter of time whether one was finished
