"""Merging on a CUDA device: the arithmetic is the processor's, and what comes out loads on the card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from adapterhub.packaging.calibration.calibrate import CalibrationText
from adapterhub.packaging.evidence import FIDELITY, FidelityEvidence, read_evidence
from adapterhub.packaging.merge import merge_adapter

pytestmark = pytest.mark.gpu

RunCli = Callable[..., tuple[int, str, str]]
WORDS = ("apples", "pears", "milk", "bread", "plums", "cheese")
SCALE = 2.0  # alpha / rank of the tiny adapter


@pytest.fixture
def text(tmp_path: Path, write_jsonl: Callable[[Path, list[dict]], Path]) -> Path:
    def row(number: int) -> dict:
        words = f"{number} {WORDS[number % len(WORDS)]} and {WORDS[number % 5]} for Ann, please."
        return {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": words}]}

    return write_jsonl(tmp_path / "text.jsonl", [row(number) for number in range(1, 13)])


@pytest.mark.parametrize("onto", ["original", "trained"])
def test_the_sum_is_taken_in_float32_of_the_weights_the_card_quantizes(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, onto: Literal["original", "trained"]
) -> None:
    from bitsandbytes import functional

    merge_adapter(tiny_adapter, tiny_base, tmp_path / "out", onto=onto, storage="bf16", device="cuda")
    before, merged = (load_file(path / "model.safetensors") for path in (tiny_base, tmp_path / "out"))
    factors = load_file(tiny_adapter / "adapter_model.safetensors")
    pairs = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in factors}
    pairs = {name for name in pairs if not name.endswith("lora_B.weight")}
    assert len(pairs) == 14
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if module not in pairs:
            assert torch.equal(merged[name], weight), name
            continue
        wide = weight.cuda()
        if onto == "trained":
            codes, state = functional.quantize_4bit(wide, compress_statistics=True, quant_type="nf4")
            wide = functional.dequantize_4bit(codes, state)
        a, b = (factors[f"base_model.model.{module}.lora_{half}.weight"].cuda().float() for half in "AB")
        expected = (wide.float() + SCALE * b @ a).bfloat16().cpu()
        # A sum of four products in another order: at most the last of bfloat16's eight bits differs.
        torch.testing.assert_close(merged[name], expected, rtol=2**-7, atol=1e-7)
        assert (merged[name] == expected).float().mean() > 0.999


@pytest.mark.parametrize("storage", ["bf16", "nf4", "fp4", "int8"])
def test_every_format_loads_plainly_on_the_card_and_is_near_the_live_model(
    tiny_release: Path, tiny_base: Path, text: Path, tmp_path: Path, run_cli: RunCli, storage: str
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    code, _, err = run_cli(
        "merge", tiny_release, "--to", storage, "--onto", "trained", "--base", tiny_base, "--text", text,
        "--out", out,
    )  # fmt: skip
    assert code == 0, err
    found = read_evidence(out, FIDELITY, FidelityEvidence)
    assert found is not None
    assert found.figures.kl_mean < 0.05
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, device_map={"": 0})
    assert next(model.parameters()).is_cuda
    answer = model.generate(torch.arange(3, 20, device="cuda")[None], max_new_tokens=4, do_sample=False)
    assert answer.shape == (1, 21)


def test_codes_chosen_on_the_card_are_nowhere_worse_than_the_nearest(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    texts = [list(range(3 + shift, 60 + shift)) for shift in range(8)]
    report = merge_adapter(
        tiny_adapter, tiny_base, tmp_path / "out", onto="trained", storage="nf4",
        calibration=CalibrationText("text", "0" * 64, texts), device="cuda",
    )  # fmt: skip
    assert report.rounding is not None
    errors = report.rounding.weights
    assert len(errors) == 14
    assert all(error.chosen <= error.nearest for error in errors)
    assert sum(error.chosen for error in errors) < 0.9 * sum(error.nearest for error in errors)


def test_a_release_is_requantized_and_an_adapter_refitted_on_the_card(
    tiny_release: Path, tiny_base: Path, text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    merged, small, other = (tmp_path / name for name in ("merged", "small", "other"))
    base = ("--base", tiny_base)
    to = ("--to", "bf16", "--onto", "original")
    code, _, err = run_cli("merge", tiny_release, *base, *to, "--out", merged)
    assert code == 0, err
    code, _, err = run_cli("requantize", merged, "--to", "nf4", "--text", text, "--out", small)
    assert code == 0, err
    code, printed, err = run_cli(
        "retarget", tiny_release, *base, "--to", "fp4", "--text", text, "--out", other, "--json"
    )
    assert code == 0, err
    evidence = json.loads(printed)
    assert evidence["refitted"]["kl_mean"] <= evidence["as_it_was"]["kl_mean"]
