"""Bases and adapters made to mislead a merge: each refused, with nothing read outside and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub.errors import ReleaseError
from adapterhub.packaging.merge import merge_adapter

Attack = Callable[[Path, Path], object]


def write_index(base: Path, mapping: object) -> None:
    (base / "model.safetensors").rename(base / "part.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def names(base: Path) -> list[str]:
    return list(load_file(base / "model.safetensors"))


def index_leads_out(base: Path, _adapter: Path) -> None:
    shutil.copy(base / "model.safetensors", base.parent / "outside.safetensors")
    write_index(base, dict.fromkeys(names(base), "../outside.safetensors"))


def index_is_absolute(base: Path, _adapter: Path) -> None:
    write_index(base, dict.fromkeys(names(base), str(base / "part.safetensors")))


def index_names_a_subfolder(base: Path, _adapter: Path) -> None:
    write_index(base, dict.fromkeys(names(base), "sub/part.safetensors"))


def index_names_numbers(base: Path, _adapter: Path) -> None:
    write_index(base, {"a": 1})


def index_is_a_list(base: Path, _adapter: Path) -> None:
    write_index(base, ["a"])


def index_is_empty(base: Path, _adapter: Path) -> None:
    write_index(base, {})


def index_hides_a_tensor(base: Path, _adapter: Path) -> None:
    write_index(base, dict.fromkeys(names(base)[1:], "part.safetensors"))


def index_promises_a_tensor(base: Path, _adapter: Path) -> None:
    write_index(base, dict.fromkeys([*names(base), "more"], "part.safetensors"))


def shard_is_missing(base: Path, _adapter: Path) -> None:
    listed = names(base)
    write_index(base, dict.fromkeys(listed, "part.safetensors") | {listed[0]: "gone.safetensors"})


def tensor_in_two_shards(base: Path, _adapter: Path) -> None:
    """The index names both files for one tensor; the last of the two keys counts in JSON."""
    tensors = load_file(base / "model.safetensors")
    mapping = json.dumps(dict.fromkeys(tensors, "part.safetensors"))
    write_index(base, {})
    twice = next(iter(tensors))
    save_file({twice: tensors[twice]}, base / "second.safetensors")
    index = f'{{"weight_map": {mapping[:-1]}, "{twice}": "second.safetensors"}}}}'
    (base / "model.safetensors.index.json").write_text(index)


def base_is_a_pickle(base: Path, _adapter: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def base_is_quantized(base: Path, _adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(config))


def config_is_deep(base: Path, _adapter: Path) -> None:
    (base / "config.json").write_text("[" * 100_000)


def config_is_a_list(base: Path, _adapter: Path) -> None:
    (base / "config.json").write_text("[]")


def header_is_too_long(base: Path, _adapter: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def base_is_cut_short(base: Path, _adapter: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])


def base_is_a_folder(base: Path, _adapter: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").mkdir()


def weights_are_eight_bit(base: Path, _adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}, base / "model.safetensors")


def adapter_is_a_pickle(_base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def adapter_reaches_for_other_weights(_base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for side in "AB":
        tensors[f"base_model.model...lora_{side}.weight"] = torch.zeros(4, 4)
    save_file(tensors, path)


def adapter_is_infinite(_base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0] = torch.inf
    save_file(tensors, path)


def adapter_overlaps_itself(_base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[first]["data_offsets"], header[first]["shape"] = (
        header[second]["data_offsets"],
        header[second]["shape"],
    )
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


ATTACKS: dict[Attack, str] = {
    index_leads_out: "has an empty, '.' or '..' part",
    index_is_absolute: "is not a relative path",
    index_names_a_subfolder: "'sub/part.safetensors' is not a file name",
    index_names_numbers: "1 is not a file name",
    index_is_a_list: "has no weight_map",
    index_is_empty: "has no weight_map",
    index_hides_a_tensor: "does not hold what",
    index_promises_a_tensor: "does not hold what",
    shard_is_missing: "gone.safetensors: no such file",
    tensor_in_two_shards: "does not hold what",
    base_is_a_pickle: "only as pickles",
    base_is_quantized: "is quantized already",
    config_is_deep: "config.json is not valid JSON",
    config_is_a_list: "not an object",
    header_is_too_long: "too short to be a safetensors file",
    base_is_cut_short: "the tensors end at byte",
    base_is_a_folder: "holds neither",
    weights_are_eight_bit: "is F8_E4M3",
    adapter_is_a_pickle: "is a pickle, which can run code",
    adapter_reaches_for_other_weights: "match no weight",
    adapter_is_infinite: "NaN or infinite",
    adapter_overlaps_itself: "overlaps another tensor",
}


@pytest.mark.parametrize(("attack", "words"), ATTACKS.items(), ids=[attack.__name__ for attack in ATTACKS])
def test_it_is_refused_and_nothing_is_written(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, attack: Attack, words: str
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_base, base)
    shutil.copytree(tiny_adapter, adapter)
    attack(base, adapter)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ReleaseError) as caught:
        merge_adapter(adapter, base, tmp_path / "out", onto="original")
    assert words in caught.value.what
    assert "\n" not in caught.value.what + caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_code_beside_the_base_is_not_carried_along(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "modeling_evil.py").write_text("print('hello')")
    merge_adapter(tiny_adapter, base, tmp_path / "out", onto="original")
    assert not list((tmp_path / "out").rglob("*.py"))
