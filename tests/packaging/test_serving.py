"""What vLLM serves of an adapter, said by inspect and in cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from adapterhub.cards.card import read_card
from adapterhub.cards.snippets import render_snippets
from adapterhub.packaging.adapter import read_adapter
from adapterhub.packaging.release import Release
from adapterhub.packaging.serving import vllm_obstacles, vllm_rank


def test_the_rank_limit_is_the_next_that_vllm_has() -> None:
    assert [vllm_rank(rank) for rank in (1, 4, 16, 65, 512, 513)] == [1, 8, 16, 128, 512, None]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, None),
        ({"use_rslora": True}, None),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "weights saved whole (lm_head)"),
        ({"bias": "lora_only"}, "weights saved whole (biases)"),
        ({"alpha_pattern": {"q_proj": 1}}, "a rank or scale of its own on model.layers.0.self_attn.q_proj"),
    ],
)
def test_what_vllm_would_refuse_is_said(
    tiny_adapter: Path, tmp_path: Path, settings: dict[str, Any], words: str | None
) -> None:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | settings))
    found = vllm_obstacles(read_adapter(folder))
    assert [obstacle[: len(words or "")] for obstacle in found] == ([words] if words else [])


def test_layers_that_vllm_does_not_know_are_named(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    path = folder / "adapter_model.safetensors"
    tensors = {name.replace("q_proj", "router"): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    assert vllm_obstacles(read_adapter(folder)) == ["layers that vLLM may not adapt: router"]


def test_inspect_and_the_card_say_it(
    tiny_release: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    assert (
        "vLLM         serves it with --enable-lora --max-lora-rank 8" in run_cli("inspect", tiny_release)[1]
    )
    content = json.loads((tiny_release / "adapter_config.json").read_text()) | {"use_dora": True}
    release = Release.open(tiny_release).with_files({"adapter_config.json": json.dumps(content).encode()})
    assert "no vLLM      DoRA" in run_cli("inspect", tiny_release)[1]
    assert all("vllm" not in snippet.code for snippet in render_snippets(read_card(release)))
