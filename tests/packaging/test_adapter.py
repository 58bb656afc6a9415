"""Reading PEFT adapters: scales as PEFT computes them, and everything that is no sound adapter refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import read_adapter

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    """A fresh copy of a sound adapter."""
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


def edit_config(folder: Path, edit: Edit) -> None:
    path = folder / "adapter_config.json"
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, edit: Edit) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_a_sound_adapter(adapter: Path) -> None:
    found = read_adapter(adapter)
    assert len(found.pairs) == 14
    assert found.others == ()
    assert found.parameters == sum(tensor.numel() for tensor in load_file(found.file.path).values())
    pair = found.pairs["model.layers.0.mlp.down_proj"]
    assert (pair.rank, pair.scale, pair.in_features, pair.out_features) == (4, 2.0, 128, 64)
    a, b = found.load_pair(pair.module)
    tensors = load_file(found.file.path)
    assert torch.equal(a, tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"])
    assert torch.equal(b, tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"])


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 7},
        {"r": 4, "lora_alpha": 7, "use_rslora": True},
        {
            "rank_pattern": {r"layers\.1\..*_proj": 5, "q_proj": 3},
            "alpha_pattern": {r"^model.layers.0.mlp.up_proj": 9},
        },
        {"rank_pattern": {"proj": 3}, "alpha_pattern": {"(q|k)_proj": 1, "q_proj": 99}},
    ],
)
def test_ranks_and_scales_are_pefts(tiny_base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path).pairs
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert found[name].scale == layer.scaling["default"]
        assert found[name].rank == layer.r["default"]


def drop_partner(tensors: dict[str, Any]) -> None:
    del tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]


def other_rank(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] = torch.zeros(5, 128)


def convolution(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] = torch.zeros(4, 128, 1, 1)


def integers(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] = torch.zeros(
        4, 128, dtype=torch.int32
    )


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop_partner, "has lora_A without its partner"),
        (other_rank, "not of rank 4"),
        (convolution, "not of rank 4"),
        (integers, "is I32, not a float tensor"),
    ],
)
def test_factors_that_make_no_pair_are_refused(adapter: Path, edit: Edit, words: str) -> None:
    edit_tensors(adapter, edit)
    with pytest.raises(ReleaseError, match=words):
        read_adapter(adapter)


def test_other_tensors_are_kept_apart(adapter: Path) -> None:
    edit_tensors(
        adapter, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)})
    )
    assert read_adapter(adapter).others == ("base_model.model.lm_head.weight",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r: "),
        ({"r": 10**9}, "r: "),
        ({"r": "many"}, "r: "),
        ({"lora_alpha": float("nan")}, "lora_alpha: "),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj: "),
        ({"rank_pattern": {"(": 1}}, "is no regular expression"),
        ({"rank_pattern": {"(a+)+$": 1}}, "too complex"),
        ({"alpha_pattern": {"a.*b.*c.*d.*": 1}}, "too complex"),
        ({"alpha_pattern": {"x" * 300: 1}}, "too complex"),
        ({"modules_to_save": "x"}, "modules_to_save"),
        ({"r": 5}, "not of rank 5"),
    ],
)
def test_settings_that_cannot_be_are_refused(adapter: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(adapter, lambda config: config.update(changes))
    with pytest.raises(ReleaseError) as caught:
        read_adapter(adapter)
    assert words in caught.value.what


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b" " * 2**21, b'"LORA"']
)
def test_a_configuration_that_is_none_is_refused(adapter: Path, content: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ReleaseError, match=r"adapter_config\.json"):
        read_adapter(adapter)


def test_a_pickle_is_named_and_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ReleaseError, match=r"adapter_model\.bin is a pickle, which can run code") as caught:
        read_adapter(adapter)
    assert "safetensors" in caught.value.fix


def test_missing_parts_are_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"holds no adapter_config\.json"):
        read_adapter(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ReleaseError, match=r"holds no adapter_model\.safetensors"):
        read_adapter(adapter)


def test_settings_of_a_later_peft_stand_in_the_way_when_they_are_set(adapter: Path) -> None:
    edit_config(adapter, lambda config: config.update(new_trick=None, other_trick=False))
    assert read_adapter(adapter).config.obstacles() == []
    edit_config(adapter, lambda config: config.update(new_trick=True))
    assert read_adapter(adapter).config.obstacles() == ["new_trick"]
