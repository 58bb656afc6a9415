"""Training from the command line on a CUDA device: the fast path, its checkpoints, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from adapterhub import load_adapter
from adapterhub.packaging.evidence import CURVE, LEDGER
from adapterhub.trainer import plan, settings

pytestmark = pytest.mark.gpu

Run = Callable[..., tuple[int, str, str]]
Interrupting = Callable[[int], AbstractContextManager[None]]
FIXED = ("--set", "lora.dropout=0")


def losses(release: Path, kind: str = "loss") -> dict[int, float]:
    points = json.loads((release / CURVE).read_bytes())["points"]
    return {point["step"]: point[kind] for point in points if point[kind] is not None}


def choose(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Plan for ``engine`` from now on, whatever the base."""
    for module in (plan, settings):
        monkeypatch.setattr(module, "engine_for", lambda *_: engine)


def test_every_engine_trains_what_the_plain_one_trains(
    run_cli: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in ("fast", "linears", "plain"):
        choose(monkeypatch, engine)
        code, _, stderr = run_cli("train", recipe, "--out", tmp_path / engine, *FIXED)
        assert code == 0, stderr
    plain = tmp_path / "plain"
    for engine in ("fast", "linears"):
        ours = tmp_path / engine
        assert losses(ours) == pytest.approx(losses(plain), rel=2e-2)
        assert losses(ours, "eval_loss") == pytest.approx(losses(plain, "eval_loss"), rel=2e-2)
        assert losses(ours, "grad_norm") == pytest.approx(losses(plain, "grad_norm"), rel=0.2)
        assert json.loads((ours / LEDGER).read_bytes())["measured_peak_bytes"] > 0


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw", "paged_adamw_8bit"])
def test_an_interrupted_run_goes_on_and_its_adapter_loads(
    run_cli: Run,
    recipe: Path,
    tmp_path: Path,
    tiny_base: Path,
    interrupting: Interrupting,
    optimizer: str,
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = (*FIXED, "--set", f"training.optimizer={optimizer}")
    assert run_cli("train", recipe, "--out", whole, *settings)[0] == 0

    with interrupting(5):
        assert run_cli("train", recipe, "--out", resumed, *settings)[0] == 130
    code, _, stderr = run_cli("train", recipe, "--out", resumed, *settings, "--resume")
    assert code == 0, stderr
    assert "resuming from checkpoint-3" in stderr
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-2)

    model, tokenizer = load_adapter(resumed, base=tiny_base)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "apples and pears"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt.to(model.device), max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("before", "after"), [("fast", "plain"), ("plain", "fast"), ("fast", "linears"), ("linears", "plain")]
)
def test_a_run_goes_on_under_another_engine(
    run_cli: Run,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupting: Interrupting,
    before: str,
    after: str,
) -> None:
    """As it must when it goes on with more GPUs, which have the plain engine."""

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_cli("train", recipe, "--out", whole, *FIXED)[0] == 0
    choose(monkeypatch, before)
    with interrupting(5):
        assert run_cli("train", recipe, "--out", resumed, *FIXED)[0] == 130
    choose(monkeypatch, after)
    code, _, stderr = run_cli("train", recipe, "--out", resumed, *FIXED, "--resume")
    assert code == 0, stderr
    assert "resuming from checkpoint-3" in stderr
    assert losses(resumed) == pytest.approx(losses(whole), rel=2e-2)


@pytest.fixture(scope="module")
def roomy(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose plan takes some 15 GB: 64 rows of 1,024 tokens through 8 layers of 512 features."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("roomy")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(folder / "base")
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    words = ("apples", "pears", "plums")
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(64):
            answer = " ".join(f"{number} {words[(number + at) % 3]}" for at in range(110))
            messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    content = {
        "name": "roomy",
        "licence": "apache-2.0",
        "base": "base",
        "data": {"train": "rows.jsonl", "max_length": 1024},
        "lora": {"rank": 4},
        "training": {"steps": 3, "batch_size": 64, "learning_rate": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@contextmanager
def only_so_much(size: int) -> Iterator[None]:
    """Torch gets no more than ``size`` bytes, while the planner sees the whole card."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(size / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("engine", ["fast", "linears", "plain"])
def test_a_card_that_has_less_than_it_said_is_planned_for_anew(
    run_cli: Run, roomy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    choose(monkeypatch, engine)
    whole, squeezed = tmp_path / "whole", tmp_path / "squeezed"
    code, _, stderr = run_cli("train", roomy, "--out", whole)
    assert code == 0, stderr
    peak = json.loads((whole / LEDGER).read_bytes())["measured_peak_bytes"]
    assert peak > 6 * 2**30

    with only_so_much(int(0.6 * peak)):
        code, _, stderr = run_cli("train", roomy, "--out", squeezed)
    assert code == 0, stderr
    assert "out of memory in step 1, though" in stderr
    assert losses(squeezed) == pytest.approx(losses(whole), rel=2e-2)
    ledger = json.loads((squeezed / LEDGER).read_bytes())
    assert ledger["misses"][0]["step"] == 0
    assert ledger["misses"][0]["predicted_peak_bytes"] > 0.6 * peak
