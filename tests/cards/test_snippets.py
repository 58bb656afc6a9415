"""The programs that a card shows are run as they stand in it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from adapterhub.cards.card import read_card
from adapterhub.cards.snippets import render_snippets
from adapterhub.packaging.manifest import Manifest
from adapterhub.packaging.release import Release


def run_programs(folder: Path) -> list[str]:
    """What each Python block of a card's README prints, run where the release's folder lies.

    vLLM's needs a GPU and vLLM: of that one only the form is held.
    """
    tokens = MarkdownIt("commonmark").parse(ModelCard.load(folder / "README.md").text)
    printed = []
    for token in tokens:
        if token.type == "fence" and token.info == "python":
            if token.content.startswith("from vllm"):
                compile(token.content, "card", "exec")
                continue
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(token.content, "card", "exec"), {})  # noqa: S102
            printed.append(out.getvalue())
    return printed


@pytest.mark.slow
def test_both_programs_run_and_say_the_same(
    tiny_release: Path,
    tiny_base: Path,
    run_cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapterhub.trainer.model.arithmetic_of", lambda _device: "bfloat16")  # as peft
    assert run_cli("card", tiny_release)[0] == 0
    (tiny_release.parent / "tiny-llama").symlink_to(tiny_base)
    monkeypatch.chdir(tiny_release.parent)
    printed = run_programs(tiny_release)
    assert len(printed) == 2
    assert printed[0] == printed[1]
    assert printed[0].strip()


def test_a_base_on_the_hub_is_named_with_its_commit(tiny_release: Path, edit: Callable[..., None]) -> None:
    base = Manifest.read(tiny_release).base
    assert base is not None
    edit(tiny_release, base=base.model_copy(update={"name": "owner/base", "revision": "f" * 40}))
    ours, peft, vllm = render_snippets(read_card(Release.open(tiny_release)))
    assert 'load_adapter("./tiny-orders")' in ours.code
    assert f'    model="owner/base",\n    revision="{"f" * 40}",' in vllm.code
    assert "max_lora_rank=8," in vllm.code  # rank 4: vLLM takes 1, 8, 16 and so on
    assert f'    "owner/base",\n    revision="{"f" * 40}",' in peft.code


def test_a_named_base_without_a_commit_is_the_readers_folder(
    tiny_release: Path, edit: Callable[..., None]
) -> None:
    """Its weights may differ from the Hub's, so only a folder with the right digest will do."""
    base = Manifest.read(tiny_release).base
    assert base is not None
    edit(tiny_release, base=base.model_copy(update={"name": "owner/base", "quantization": None}))
    ours, peft, vllm = render_snippets(read_card(Release.open(tiny_release)))
    assert 'load_adapter("./tiny-orders", base="./base")' in ours.code
    assert 'model="./base"' in vllm.code
    assert "bitsandbytes" not in vllm.code
    assert '"./base"' in peft.code
    assert "quantization" not in peft.code
    compile(peft.code, "card", "exec")
