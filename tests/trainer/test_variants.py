"""Every kind of adapter that a recipe may name: trained from the command line, released, loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from adapterhub import load_adapter
from adapterhub.packaging.adapter import read_adapter

Run = Callable[..., tuple[int, str, str]]
Interrupting = Callable[[int], AbstractContextManager[None]]
TEXT = [1, 17, 40, 5, 99, 230, 7, 61, 12, 3]


@pytest.fixture
def live_logits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The logits for TEXT of each model that is trained here, at the moment before it becomes a release."""
    from adapterhub.trainer.loop import AdapterTrainer

    real, found = AdapterTrainer.finish, []

    def finish(self: AdapterTrainer) -> Any:
        model = real(self).eval()
        found.append(logits(model))
        return model

    monkeypatch.setattr(AdapterTrainer, "finish", finish)
    return found


def logits(model: Any) -> Any:
    """For TEXT, (tokens, vocabulary) in float32: computed as in training, under autocast."""
    import torch

    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
        return model(input_ids=torch.tensor([TEXT], device=model.device)).logits[0].float().cpu()


def train(run_cli: Run, recipe: Path, out: Path, *settings: str) -> None:
    changes = ["training.steps=3", "lora.dropout=0", *settings]
    code, _, stderr = run_cli("train", recipe, "--out", out, *[x for s in changes for x in ("--set", s)])
    assert code == 0, stderr


PATTERNS = [
    r"lora.target_modules='.*layers\.1\..*_proj'",
    r"lora.rank_pattern={'self_attn\.[qv]_proj': 2, down_proj: 6}",
    "lora.alpha_pattern={down_proj: 3}",
]
TOKENS = ["lora.new_tokens=['<count>', '</count>']"]
VARIANTS = {
    "patterns tokens": [*PATTERNS, *TOKENS],
}
SLOW_VARIANTS = {
    "pissa": ["lora.init=pissa", "quantization=null"],
    "loftq dora rslora": ["lora.init=loftq", "lora.dora=true", "lora.rslora=true"],
    "rslora": ["lora.rslora=true", "lora.alpha=8"],
    "dora": ["lora.dora=true"],
    "loftq": ["lora.init=loftq"],
    "patterns": PATTERNS,
    "tokens": TOKENS,
    "pissa rslora": ["lora.init=pissa", "lora.rslora=true", "quantization=null"],
    "tokens dora": [*TOKENS, "lora.dora=true"],
    "pissa patterns": [*PATTERNS, "lora.init=pissa", "quantization=null"],
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [*VARIANTS.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW_VARIANTS.items())],
)
def test_what_is_loaded_is_what_was_trained(
    run_cli: Run,
    recipe: Path,
    tmp_path: Path,
    tiny_base: Path,
    live_logits: list[Any],
    name: str,
    settings: list[str],
) -> None:
    import torch

    from adapterhub.trainer.model import keep_codes_for_training

    out = tmp_path / "out"
    train(run_cli, recipe, out, *settings)
    model, _ = load_adapter(out, base=tiny_base)
    keep_codes_for_training(model)  # the product that training uses, not the faster one for inference
    loaded = logits(model)
    with model.disable_adapter():
        untrained = logits(model)
    (live,) = live_logits
    changed = float((untrained[:, :300] - live[:, :300]).abs().max())
    assert changed > 0.2
    # PiSSA trains on W - BA rounded to bf16, and is released for W; all others are the same products.
    tolerance = 0.05 * changed if "pissa" in name else 1e-5
    assert torch.allclose(loaded, live, atol=tolerance, rtol=0)

    assert run_cli("scan", out)[0] == 0
    code, stdout, _ = run_cli("inspect", out, "--json")
    assert code == 0
    assert json.loads(stdout)["adapter"]["merge_obstacles"] == []
    onto = "original" if "pissa" in name else "trained"
    where = ("--base", tiny_base, "--out", tmp_path / "merged")
    code, _, stderr = run_cli("merge", out, "--to", "bf16", "--onto", onto, *where)
    assert code == 0, stderr
    merged, _ = load_adapter(tmp_path / "merged")
    answers = logits(merged)
    assert answers.shape == live.shape
    assert torch.allclose(answers, live, atol=0.1 * changed, rtol=0)  # rounded to bf16


def test_of_new_tokens_only_their_rows_are_released(
    run_cli: Run, recipe: Path, tmp_path: Path, tiny_base: Path, rows: Path, live_logits: list[Any]
) -> None:
    """With a head of its own, so that rows of both tables are trained, merged and loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    untied, out = tmp_path / "untied", tmp_path / "out"
    config = AutoConfig.from_pretrained(tiny_base, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(untied)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(untied)
    lines = (rows / "train.jsonl").read_text()
    (rows / "train.jsonl").write_text(lines.replace('{\\"n\\":', "<count>"))
    assert "<count>" in (rows / "train.jsonl").read_text()
    train(run_cli, recipe, out, f"base={untied}", "lora.new_tokens=['<count>', '[end]']")

    adapter = read_adapter(out)
    known = config.vocab_size
    ids = [known, known + 1]
    assert adapter.config.trainable_token_indices == {"embed_tokens": ids, "lm_head": ids}
    assert {name: entry.shape for name, entry in adapter.tokens.items()} == {
        "model.embed_tokens": (2, 64), "lm_head": (2, 64),
    }  # fmt: skip
    assert not adapter.whole
    first, second = (adapter.load(adapter.tokens[name]) for name in ("model.embed_tokens", "lm_head"))
    assert (first[0] - first[1]).abs().max() > 1e-3  # the one that the data has was trained
    assert first.shape == second.shape

    model, tokenizer = load_adapter(out, base=untied)
    assert tokenizer("a<count>[end]", add_special_tokens=False)["input_ids"][-2:] == [known, known + 1]
    assert tokenizer.decode([known, known + 1], skip_special_tokens=True) == "<count>[end]"
    assert logits(model).shape[1] == known + 2
    merged = tmp_path / "merged"
    where = ("--base", untied, "--out", merged)
    code, _, stderr = run_cli("merge", out, "--to", "nf4", "--onto", "original", *where)
    assert code == 0, stderr
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert whole.config.vocab_size == known + 2
    assert torch.equal(whole.lm_head.weight[known:].float(), second.bfloat16().float())
    assert torch.equal(whole.model.embed_tokens.weight[known:].float(), first.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [["lora.dora=true", *TOKENS], SLOW_VARIANTS["pissa"], ["lora.init=loftq"]]
)
def test_a_variant_interrupted_resumes_to_the_same_bytes(
    run_cli: Run, recipe: Path, tmp_path: Path, interrupting: Interrupting, settings: list[str]
) -> None:
    arguments = [x for change in settings for x in ("--set", change)]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_cli("train", recipe, "--out", whole, *arguments)[0] == 0
    with interrupting(5):
        assert run_cli("train", recipe, "--out", resumed, *arguments)[0] == 130
    code, _, stderr = run_cli("train", recipe, "--out", resumed, "--resume", *arguments)
    assert code == 0, stderr
    name = "adapter_model.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["lora.init=pissa"], "quantization to null"),
        (["lora.init=loftq", "quantization=null"], "there is none"),
        (["lora.init=loftq", "quantization.type=int8"], "there is none"),
        (["lora.init=pissa", "quantization=null", "lora.dora=true"], "keep one"),
        (["lora.target_modules='.*(a+)+'"], "too complex"),
        (["lora.rank_pattern={'q_proj(': 2}"], "no regular expression"),
        (["lora.rank_pattern={qq_proj: 2}"], "qq_proj"),
        (["lora.target_modules=qq_proj"], "qq_proj"),
        (["lora.new_tokens=[apples, apples]"], "twice"),
        (["lora.new_tokens=[ünï]"], "would decode 'ünï'"),
        (["lora.new_tokens=['<|im_end|>']"], "knows '<|im_end|>' already"),
    ],
)
def test_what_cannot_be_right_is_refused_in_words(
    run_cli: Run, recipe: Path, tmp_path: Path, settings: list[str], problem: str
) -> None:
    arguments = [x for change in settings for x in ("--set", change)]
    code, _, stderr = run_cli("train", recipe, "--out", tmp_path / "out", *arguments)
    assert code == 2, stderr
    assert problem in stderr
    assert "Traceback" not in stderr
