"""The ledger: QLoRA's published figures, what must hold for any shape, and what autograd really saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapterhub.packaging.manifest import Hardware, Quantization
from adapterhub.trainer.activations import Setting, kept_bytes
from adapterhub.trainer.arithmetic import Arithmetic
from adapterhub.trainer.ledger import GIB, Ledger, ledger, scale_bits
from adapterhub.trainer.placement import adapter_weights
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import ModelShape, shape_of

GPU = Hardware(device="cuda", name="a GPU", memory_bytes=48 * GIB)
CPU = Hardware(device="cpu", name="a processor", memory_bytes=16 * GIB)


def llama(hidden: int, layers: int, heads: int, intermediate: int, **more: Any) -> ModelShape:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "vocab_size": 32000,
    }
    return shape_of({**config, **more})


LLAMA_65B = llama(8192, 80, 64, 22016)


def recipe(rank: int = 16, length: int = 512, **sections: Any) -> Recipe:
    content: dict[str, Any] = {
        "name": "r",
        "base": "b",
        "data": {"train": "t", "max_length": length},
        "lora": {"rank": rank},
        **sections,
    }
    return Recipe.from_dict(content, Path())


def part(found: Ledger, name: str) -> int:
    return sum(line.bytes for line in found.parts if line.name == name)


def test_double_quantization_costs_what_the_paper_says() -> None:
    """QLoRA section 3: from 32/64 = 0.5 bits to 8/64 + 32/(64·256) = 0.127 bits a parameter."""
    assert scale_bits(Quantization(double=False)) == 0.5
    assert scale_bits(Quantization(double=True)) == pytest.approx(0.127, abs=5e-4)


def test_65b_fits_48_gb_as_in_the_paper() -> None:
    """QLoRA: a 65B model on one 48 GB GPU; its 4-bit base is about 33 GB and r=64 everywhere is 0.8 B
    weights.
    """
    setting = Setting(1, "paged_adamw", "fast", recompute_all=80)
    found = ledger(LLAMA_65B, recipe(rank=64), GPU, setting)
    base = part(found, "base codes") + part(found, "base scales")
    assert base == pytest.approx(33.4e9, rel=0.01)
    assert adapter_weights(LLAMA_65B, recipe(rank=64).lora) == pytest.approx(0.8e9, rel=0.01)
    assert found.predicted_peak_bytes < 48e9


@pytest.mark.parametrize("double", [True, False])
def test_scales_are_those_of_bitsandbytes(double: bool) -> None:
    """Codes and scales of a real NF4 weight, byte for byte but for the 16-value code tables and the fp32
    offset.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        torch.randn(1024, 512), blocksize=64, quant_type="nf4", compress_statistics=double
    )
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    assert codes.nbytes == 1024 * 512 // 2
    assert scales * 8 / (1024 * 512) == pytest.approx(scale_bits(Quantization(double=double)), rel=1e-6)


shapes = st.builds(
    lambda heads, groups, dim, layers, wide: llama(
        heads * groups * dim, layers, heads * groups, 32 * wide, num_key_value_heads=heads
    ),
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from([16, 64, 128]),
    st.integers(1, 40),
    st.integers(1, 200),
)
engines = st.sampled_from(["fast", "linears", "plain"])
optimizers = st.sampled_from(["adamw", "paged_adamw", "paged_adamw_8bit"])


@given(
    shape=shapes,
    rank=st.integers(1, 128),
    length=st.integers(8, 4096),
    rows=st.integers(1, 64),
    engine=engines,
    optimizer=optimizers,
    recomputed=st.integers(0, 40),
    on_cuda=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_more_of_anything_never_takes_less(
    shape: ModelShape,
    rank: int,
    length: int,
    rows: int,
    engine: Any,
    optimizer: Any,
    recomputed: int,
    on_cuda: bool,
) -> None:
    """Batch, length, rank and layers; and the parts add up."""
    hardware = GPU if on_cuda else CPU
    setting = Setting(rows, optimizer, engine, recompute_all=min(recomputed, shape.layers))
    found = ledger(shape, recipe(rank, length), hardware, setting)
    assert found.predicted_peak_bytes == sum(p.bytes for p in found.parts if p.on == "device")
    assert found.host_bytes == sum(p.bytes for p in found.parts if p.on == "host")
    assert all(p.bytes > 0 and p.formula for p in found.parts)

    total = found.predicted_peak_bytes + found.host_bytes

    def grown(shape: ModelShape = shape, rank: int = rank, length: int = length, rows: int = rows) -> int:
        changed = Setting(rows, optimizer, engine, recompute_all=min(recomputed, setting.recompute_all))
        bigger = ledger(shape, recipe(rank, length), hardware, changed)
        return bigger.predicted_peak_bytes + bigger.host_bytes

    deeper = llama(
        shape.hidden, shape.layers + 1, shape.heads, shape.intermediate, num_key_value_heads=shape.kv_heads
    )
    assert grown(rows=rows + 1) > total
    assert grown(length=length + 1) > total
    assert grown(rank=rank + 1) > total
    assert grown(shape=deeper) > total


@st.composite
def choices(draw: st.DrawFn) -> tuple[ModelShape, Setting, dict[str, Any]]:
    """Any shape, any setting that the planner may try on it, and any kind of base and adapter."""
    shape = draw(shapes)
    whole = draw(st.integers(0, shape.layers))
    engine = draw(engines)
    setting = Setting(
        draw(st.integers(1, 64)),
        draw(optimizers),
        engine,
        recompute_all=whole,
        recompute_mlp=draw(st.integers(0, shape.layers - whole)) if engine == "fast" else 0,
        offload=engine == "fast" and whole > 0 and draw(st.booleans()),
        kept_weights=draw(st.integers(0, shape.layers)) if engine == "fast" else 0,
        shards=draw(st.sampled_from([1, 2, 8])) if engine == "plain" else 1,
    )
    kinds = [{"type": "nf4"}, {"type": "nf4", "double": False}, {"type": "fp4"}]
    if engine == "plain":
        kinds += [None, {"type": "int8"}]
    lora = {"rank": draw(st.integers(1, 128)), "dropout": draw(st.sampled_from([0.0, 0.1]))}
    if engine == "plain":
        lora |= {"dora": draw(st.booleans()), "new_tokens": draw(st.sampled_from([[], ["<a>", "<b>"]]))}
    return shape, setting, {"quantization": draw(st.sampled_from(kinds)), "lora": lora}


OFFLOADED = Setting(52, "adamw", "fast", recompute_all=1, offload=True)


@given(chosen=choices(), length=st.integers(8, 4096))
@example(chosen=(llama(32, 1, 2, 64), OFFLOADED, {"lora": {"rank": 1}}), length=23)
@settings(max_examples=150, deadline=None)
def test_neither_device_nor_host_ever_takes_less_for_more(
    chosen: tuple[ModelShape, Setting, dict[str, Any]], length: int
) -> None:
    """With offloading, kept weights, shards and every kind of base: each side by itself."""
    shape, setting, sections = chosen
    found = ledger(shape, recipe(length=length, **sections), GPU, setting)
    assert found.predicted_peak_bytes + found.host_bytes == sum(part.bytes for part in found.parts)
    higher = {**sections, "lora": {**sections["lora"], "rank": sections["lora"]["rank"] + 1}}
    deeper = llama(
        shape.hidden, shape.layers + 1, shape.heads, shape.intermediate, num_key_value_heads=shape.kv_heads
    )
    more = {
        "row": ledger(
            shape,
            recipe(length=length, **sections),
            GPU,
            replace(setting, micro_batch=setting.micro_batch + 1),
        ),
        "token": ledger(shape, recipe(length=length + 1, **sections), GPU, setting),
        "rank": ledger(shape, recipe(length=length, **higher), GPU, setting),
        "layer": ledger(deeper, recipe(length=length, **sections), GPU, setting),
    }
    for what, bigger in more.items():
        assert bigger.predicted_peak_bytes > found.predicted_peak_bytes, what
        assert bigger.host_bytes >= found.host_bytes, what


@given(shape=shapes, rows=st.integers(1, 16))
@settings(max_examples=50, deadline=None)
def test_recomputing_more_layers_never_takes_more(shape: ModelShape, rows: int) -> None:
    layers = shape.layers
    path = [(0, mlp) for mlp in range(layers + 1)] + [
        (whole, layers - whole) for whole in range(1, layers + 1)
    ]
    peaks = [
        ledger(shape, recipe(), GPU, Setting(rows, "adamw", "fast", *step)).predicted_peak_bytes
        for step in path
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_levels_of_recomputation_keep_what_their_names_say() -> None:
    shape = llama(4096, 32, 32, 11008)
    assert kept_bytes(shape, "all") == 2 * 4096
    assert kept_bytes(shape, "mlp") == 2 * 6 * 4096 + 4 * 32 + 2 * 4
    assert kept_bytes(shape, "none") - kept_bytes(shape, "mlp") == 2 * 2 * 11008


@pytest.mark.parametrize("level", ["none", "mlp", "all"])
def test_the_fast_path_keeps_what_the_ledger_says(level: Any) -> None:
    """Every tensor that a real layer keeps, and the buffer that its dequantized weights need, byte for byte.

    In bf16 on the CPU, where attention's log-sum-exp (fp32, one a head and token) is not kept.
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import LlamaConfig, LlamaForCausalLM

    from adapterhub.trainer.fast.attention import Sequences
    from adapterhub.trainer.fast.block import Batch, Values
    from adapterhub.trainer.fast.install import install_blocks
    from adapterhub.trainer.model import attach_adapter

    shape = llama(128, 2, 4, 320, num_key_value_heads=2)
    config = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=320,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            linear = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            linear.weight.data.copy_(module.weight)
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, linear.to("cpu"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    wanted = recipe(4, 32)
    peft_model = attach_adapter(model, wanted.lora, seed=0)
    recomputed = {"none": {}, "mlp": {"recompute_mlp": 2}, "all": {"recompute_all": 2}}[level]
    setting = Setting(1, "adamw", "fast", **recomputed)
    fast = install_blocks(peft_model.get_base_model(), setting, torch.bfloat16, torch.device("cpu"))

    tokens, block = 32, fast.blocks[0]
    angles = torch.randn(tokens, 32).bfloat16()
    whole = Sequences(torch.tensor([0, tokens], dtype=torch.int32), tokens)
    _, kept = block.forward(torch.randn(tokens, 128).bfloat16(), Batch(angles, angles, whole, None, True))
    assert isinstance(kept, Values)
    tensors = [value for value in vars(kept).values() if isinstance(value, torch.Tensor)]
    tensors += [kept.attention.out] if kept.attention else []
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    log_sum_exp = 0 if level == "all" else 4 * shape.heads
    assert sum(storages.values()) == tokens * (kept_bytes(shape, level) - log_sum_exp)
    found = ledger(shape, wanted, GPU, setting)
    assert part(found, "dequantized weight") == 2 * block.engine.products.buffer_elements


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("rows", "length", "lora"),
    [
        (2, 64, {"rank": 4}),
        (1, 128, {"rank": 16}),
        (
            1,
            128,
            {"rank": 4, "rank_pattern": {"layers.1.mlp.[a-z_]*": 32}, "target_modules": r".*1\..*_proj"},
        ),
        (1, 128, {"rank": 4, "dora": True}),
    ],
)
def test_saved_activations_are_what_autograd_saves(
    tiny_base: Path,
    rows: int,
    length: int,
    lora: dict[str, Any],
    arithmetic: Arithmetic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plain engine's formula against every tensor that a real forward pass hands to autograd."""
    assert_saved_as_predicted(tiny_base, recipe(length=length, lora=lora), rows, arithmetic, monkeypatch)


# What each family needs beside the sizes that all are given.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_activations_are_what_autograd_saves_in_every_family(
    family: str, arithmetic: Arithmetic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused projections, normed heads, scores that are soft-capped as matrices: each has its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 300,
    }
    config = AutoConfig.for_model(family, **sizes, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    assert_saved_as_predicted(tmp_path, recipe(length=256, rank=4), 1, arithmetic, monkeypatch)


def assert_saved_as_predicted(
    base: Path, wanted: Recipe, rows: int, arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 %, by every tensor that is handed to autograd in one pass over ``rows`` rows."""
    length = wanted.data.max_length
    import torch

    from adapterhub.trainer.model import attach_adapter, load_base
    from adapterhub.trainer.shapes import read_shape

    monkeypatch.setattr("adapterhub.trainer.model.arithmetic_of", lambda _device: arithmetic)
    model = attach_adapter(load_base(base, Quantization(), "cpu"), wanted.lora, seed=0).train()
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(3, 300, (rows, length))
    positions = torch.cat([torch.arange(length // 2)] * 2).repeat(rows, 1)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "bfloat16"),
    ):
        model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss.backward()

    shape = read_shape(base / "config.json")
    found = ledger(
        shape, wanted, CPU.model_copy(update={"arithmetic": arithmetic}), Setting(rows, "adamw", "plain")
    )
    capped = 2 if arithmetic == "bfloat16" else 4
    logits = (4 + (capped if shape.softcap else 0)) * rows * length * shape.vocab  # log-softmax, and tanh
    copies = part(found, "adapter copies") if arithmetic == "bfloat16" else 0
    identities = sum(each.bytes for each in found.parts if each.name == "DoRA's identities")
    predicted = part(found, "saved activations") + copies + logits + identities
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(predicted, rel=0.05)
