"""Training from the command line on a CUDA device: the fast path, its checkpoints, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

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
