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
from adapterhub.packaging.manifest import Manifest, Quantization
from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]


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


@pytest.fixture
def ready(
    tiny_release: Path, tiny_base: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """``ready(folder)`` makes the card and gives what its programs print; the base lies where they say."""
    monkeypatch.setattr("adapterhub.trainer.model.arithmetic_of", lambda _device: "bfloat16")  # as peft
    (tiny_release.parent / "tiny-llama").symlink_to(tiny_base)
    monkeypatch.chdir(tiny_release.parent)

    def run(folder: Path) -> list[str]:
        code, _, err = run_cli("card", folder)
        assert code == 0, err
        printed = run_programs(folder)
        assert all(text.strip() for text in printed)
        return printed

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantization",
    [Quantization(), Quantization(type="fp4", double=False), Quantization(type="int8", double=False), None],
    ids=["nf4", "fp4", "int8", "bf16"],
)
def test_both_programs_run_and_say_the_same(
    tiny_release: Path,
    ready: Callable[..., list[str]],
    edit: Callable[..., None],
    quantization: Quantization | None,
) -> None:
    base = Manifest.read(tiny_release).base
    assert base is not None
    edit(tiny_release, base=base.model_copy(update={"quantization": quantization}))
    ours, peft = ready(tiny_release)
    assert ours == peft


@pytest.mark.slow
def test_both_programs_load_the_tokens_that_an_adapter_brings(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, ready: Callable[..., list[str]]
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(known + 2, mean_resizing=False)
    model.get_input_embeddings().weight.data[known:] = 0  # said by no answer
    rows = {"embed_tokens": [known, known + 1]}
    settings = LoraConfig(
        r=4, target_modules="all-linear", trainable_token_indices=rows, task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    adapted = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "tokens", save_embedding_layers=False)
    names = ("adapter_config.json", "adapter_model.safetensors")
    Release.open(tiny_release).with_files({name: (tmp_path / "tokens" / name).read_bytes() for name in names})
    ours, peft = ready(tiny_release)
    assert ours == peft


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_the_program_of_a_merged_model_says_what_it_says_with_ours(
    tiny_release: Path, tiny_base: Path, run_cli: RunCli, ready: Callable[..., list[str]], kind: str
) -> None:
    from adapterhub import load_adapter

    merged = tiny_release.parent / "tiny-orders-merged"
    code, _, err = run_cli(
        "merge", tiny_release, "--to", kind, "--onto", "trained", "--base", tiny_base, "--out", merged
    )
    assert code == 0, err
    release = Release.open(merged)
    (program,) = [it for it in render_snippets(read_card(release)) if it.title == "With transformers"]
    assert f'from_pretrained("./{release.manifest.name}", dtype="auto")' in program.code
    if release.manifest.name != merged.name:
        merged = merged.rename(merged.with_name(release.manifest.name))
    (printed,) = ready(merged)
    model, tokenizer = load_adapter(merged)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program.code[program.code.index("messages = ") :], {"model": model, "tokenizer": tokenizer})  # noqa: S102
    assert printed == out.getvalue()


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
