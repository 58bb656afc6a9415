"""Files that change between the check and the load: what is loaded is what was checked, or nothing is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub import AdapterHubError, ReleaseError, SignatureError, load_adapter
from adapterhub.load import load_release, open_release
from adapterhub.packaging.release import Release
from adapterhub.trainer import model as loading

Attack = Callable[[Path], object]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base" / "tiny-llama"))


def before_loading(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do ``act`` when everything is checked, just before transformers opens the base."""
    real = loading.load_base

    def late(*args: object, **named: object) -> object:
        act()
        return real(*args, **named)

    monkeypatch.setattr(loading, "load_base", late)


def flip(path: Path, position: int = -3) -> None:
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(position, os.SEEK_END)
        file.write(bytes([byte ^ 0x10]))


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    flip(other)
    other.replace(path)


def change_and_restore(path: Path) -> None:
    """Another content while it is read, then the old content and the old time again."""
    before = path.stat()
    data = path.read_bytes()
    flip(path)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def away_and_back(path: Path) -> None:
    path.rename(path.with_name("aside"))
    shutil.copy(path.with_name("aside"), path)
    path.unlink()
    path.with_name("aside").rename(path)


def answers(model: object) -> object:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


def test_an_adapter_that_changes_after_its_check_is_loaded_as_it_was(
    tiny_release: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    expected = answers(load_adapter(tiny_release, base=base)[0])

    def attack() -> None:
        flip(tiny_release / "adapter_model.safetensors")
        (tiny_release / "adapter_config.json").write_text("{}")
        (tiny_release / "chat_template.jinja").unlink()

    before_loading(monkeypatch, attack)
    model, tokenizer = load_adapter(tiny_release, base=base)
    assert torch.equal(answers(model), expected)
    assert "im_start" in tokenizer.chat_template
    assert tokenizer.name_or_path == str(tiny_release)
    with pytest.raises(SignatureError):
        load_adapter(tiny_release, base=base)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"])
def test_a_release_that_changes_after_it_was_opened_is_refused(
    tiny_release: Path, base: Path, name: str
) -> None:
    release = open_release(tiny_release)
    flip(tiny_release / name)
    with pytest.raises(SignatureError, match=f"{tiny_release / name} is no longer the file") as caught:
        load_release(release, base)
    assert "adapterhub-" not in caught.value.what.replace(str(tiny_release), "")
    (tiny_release / name).unlink()
    with pytest.raises(SignatureError, match="went away"):
        load_release(release, base)


@pytest.mark.parametrize("attack", [flip, replace, change_and_restore, away_and_back])
def test_a_base_that_changes_while_it_is_loaded_is_refused(
    tiny_release: Path, base: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    weights = base / "model.safetensors"
    before_loading(monkeypatch, lambda: attack(weights))
    with pytest.raises(SignatureError, match=f"{weights} changed while it was loaded"):
        load_adapter(tiny_release, base=base)


def test_what_is_put_beside_the_base_is_not_read(tiny_release: Path, base: Path, tiny_adapter: Path) -> None:
    """transformers follows an adapter_config.json to another base, and an index to any path."""
    config = json.loads((tiny_adapter / "adapter_config.json").read_bytes())
    (base / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere"}))
    model, _ = load_adapter(tiny_release, base=base)
    assert model.config.name_or_path == str(base)
    shutil.copy(base / "model.safetensors", base.parent / "evil.safetensors")
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": str(base.parent / "evil.safetensors")}})
    )
    with pytest.raises(ReleaseError, match="is not a relative path") as caught:
        load_adapter(tiny_release, base=base)
    assert str(base / "model.safetensors.index.json") in caught.value.what


def test_a_merged_release_that_changes_while_it_is_loaded_is_refused(
    tiny_release: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Callable
) -> None:
    merged = tmp_path / "merged"
    arguments = ("--to", "bf16", "--onto", "original", "--base", base, "--out", merged)
    assert run_cli("merge", tiny_release, *arguments)[0] == 0
    release = open_release(merged)
    before_loading(monkeypatch, lambda: flip(merged / "model.safetensors"))
    with pytest.raises(SignatureError, match="changed while it was loaded"):
        load_release(release)
    with pytest.raises(SignatureError, match="is no longer the file that"):
        load_release(release)
    flip(merged / "model.safetensors")  # back as it was
    Release.open(merged).with_files({"adapter_config.json": b"{}"})
    with pytest.raises(AdapterHubError, match="makes transformers load another model"):
        load_adapter(merged)
