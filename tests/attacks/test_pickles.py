"""Pickles given to `adapterhub convert`: what would run code is named, the rest opened apart."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapterhub.packaging import conversion, unpickling
from adapterhub.packaging.scan.report import check_loadable

Run = Callable[..., tuple[int, str, str]]
TRACE = Path("/tmp/opened-a-pickle-to-convert")


class Calls:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {TRACE}",)


class Connects:
    """What no list of dangerous names has: only weights-only loading stops it."""

    def __reduce__(self) -> tuple[Any, ...]:
        import http.client

        return http.client.HTTPConnection, ("127.0.0.1",)


@pytest.fixture
def folder(tiny_adapter: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(tiny_adapter / "adapter_config.json", folder)
    return folder


def save(folder: Path, held: object, **how: object) -> Path:
    torch.save(held, folder / "adapter_model.bin", **how)
    return folder / "adapter_model.bin"


def compressed(folder: Path) -> None:
    path = save(folder, {"a": torch.zeros(4096)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def truncated(folder: Path) -> None:
    path = save(folder, {"a": torch.zeros(4096)}, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:40])


UNOPENED: dict[str, tuple[Callable[[Path], object], str]] = {
    "calls, in torch's archive": (
        lambda it: save(it, {"a": Calls()}),
        "calls posix.system when it is opened",
    ),
    "calls, in torch's old format": (
        lambda it: save(it, {"a": Calls()}, _use_new_zipfile_serialization=False),
        "calls posix.system when it is opened",
    ),
    "calls, bare": (
        lambda it: (it / "adapter_model.bin").write_bytes(pickle.dumps(Calls())),
        "calls posix.system when it is opened",
    ),
    "compressed": (compressed, "an archive that grows when it is opened"),
    "cut short": (truncated, "is no pickle of tensors"),
    "text": (lambda it: (it / "adapter_model.bin").write_text("hello"), "is no pickle of tensors"),
    "missing": (lambda it: None, "no such file"),
}
UNFIT: dict[str, tuple[Callable[[], object], str]] = {
    "a list": (lambda: [torch.zeros(2)], "it holds a list, not tensors by name"),
    "nested": (lambda: {"a": {"b": torch.zeros(2)}}, "'a' is a dict, not a tensor by name"),
    "numbers for names": (lambda: {1: torch.zeros(2)}, "1 is a Tensor, not a tensor by name"),
    "more than its file holds": (lambda: {"a": torch.zeros(1).expand(10**12)}, "are larger than the file"),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, "'a' is no plain tensor"),
    "nothing": (dict, "it holds a dict, not tensors by name"),
}


@pytest.mark.parametrize(("attack", "words"), UNOPENED.values(), ids=UNOPENED)
def test_it_is_named_and_not_opened(
    folder: Path,
    attack: Callable[[Path], object],
    words: str,
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attack(folder)
    monkeypatch.setattr(conversion, "_open_apart", pytest.fail)
    code, _, err = run_cli("convert", folder / "adapter_model.bin", "--out", folder.parent / "out")
    assert (code, words in err, str(folder / "adapter_model.bin") in err) == (3, True, True)
    assert not TRACE.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize(("make", "words"), UNFIT.values(), ids=UNFIT)
def test_only_plain_tensors_by_name_are_taken(folder: Path, make: Callable[[], object], words: str) -> None:
    path = save(folder, make())
    answer = unpickling.take_tensors(str(path), str(folder / "out"), path.stat().st_size)
    assert words in str(answer["error"])
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_what_weights_only_loading_refuses_is_named(folder: Path, run_cli: Run) -> None:
    path = save(folder, {"a": Connects()})
    code, _, err = run_cli("convert", path, "--out", folder.parent / "out")
    assert (code, "HTTPConnection" in err, "add_safe_globals" in err) == (3, True, False)
    assert not (folder.parent / "out").exists()


@pytest.mark.slow
def test_tensors_come_out_as_they_were(
    tiny_adapter: Path, folder: Path, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(tiny_adapter / "adapter_model.safetensors")
    path, out = save(folder, tensors), folder.parent / "out"
    (folder / "modeling.py").write_text("print('hello')")
    monkeypatch.setenv("HF_TOKEN", "secret")
    code, said, err = run_cli("convert", path, "--out", out, "--json")
    assert code == 0, err
    assert json.loads(said)["tensors"] == len(tensors)
    made = load_file(out / "adapter_model.safetensors")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[name], tensors[name]) for name in tensors)
    assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    check_loadable(out)
    assert run_cli("convert", path, "--out", out)[0] == 3  # nothing is overwritten
    assert run_cli("convert", out / "adapter_model.safetensors", "--out", folder.parent / "x")[0] == 3
    (folder / "adapter_config.json").unlink()
    code, _, err = run_cli("convert", path, "--out", folder.parent / "x")
    assert (code, "no adapter_config.json beside" in err) == (3, True)
