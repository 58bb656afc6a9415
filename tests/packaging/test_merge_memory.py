"""Streaming: what a merge holds in memory does not grow with the number of layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

MERGE = """
import sys
from adapterhub.cli import main
code = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
raise SystemExit(code)
"""
FEW, MANY = 3, 24
GROWTH = 32 << 20  # bytes; the layers between are 160 MB in 16 bits


def make_model(folder: Path, layers: int) -> tuple[Path, Path]:
    """A base, and an adapter on all its linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=256,
    )
    base, adapter = folder / f"base-{layers}", folder / f"adapter-{layers}"
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(base)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(adapter)
    return base, adapter


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_memory_does_not_grow_with_the_layers(tmp_path: Path, storage: str) -> None:
    peaks = {}
    for layers in (FEW, MANY):
        base, adapter = make_model(tmp_path, layers)
        out = tmp_path / f"out-{layers}"
        arguments = [adapter, "--base", base, "--to", storage, "--onto", "original", "--out", out]
        done = subprocess.run(
            [sys.executable, "-c", MERGE, "merge", *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        peaks[layers] = int(done.stdout.split()[-1]) << 10
    between = sum(file.stat().st_size for file in (tmp_path / f"base-{MANY}").glob("*.safetensors"))
    assert between > 4 * GROWTH
    assert peaks[MANY] - peaks[FEW] < GROWTH, peaks
