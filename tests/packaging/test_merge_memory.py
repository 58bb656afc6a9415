"""Streaming: what a merge holds in memory does not grow with the number of layers."""

from __future__ import annotations

import os
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
# What is freed goes back at once, so that the peak tells what is held and not what malloc keeps for later.
FREEING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}


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


CHOOSE = """
import sys
from pathlib import Path
from adapterhub.packaging.calibration.calibrate import CalibrationText
from adapterhub.packaging.merge import merge_adapter
adapter, base, out = map(Path, sys.argv[1:])
text = CalibrationText("text", "0" * 64, [list(range(64)), list(range(64, 128))])
merge_adapter(adapter, base, out, onto="trained", storage="nf4", calibration=text)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("storage", "onto"), [("bf16", "original"), ("bf16", "trained"), ("nf4", "original")]
)
def test_memory_does_not_grow_with_the_layers(tmp_path: Path, storage: str, onto: str) -> None:
    peaks = {}
    for layers in (FEW, MANY):
        base, adapter = make_model(tmp_path, layers)
        out = tmp_path / f"out-{layers}"
        peaks[layers] = peak_of(
            MERGE, "merge", adapter, "--base", base, "--to", storage, "--onto", onto, "--out", out
        )
    between = sum(file.stat().st_size for file in (tmp_path / f"base-{MANY}").glob("*.safetensors"))
    assert between > 4 * GROWTH
    assert peaks[MANY] - peaks[FEW] < GROWTH, peaks


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_layers_that_codes_are_chosen_for(tmp_path: Path) -> None:
    peaks = {}
    for layers in (2, 6):
        base, adapter = make_model(tmp_path, layers)
        peaks[layers] = peak_of(CHOOSE, adapter, base, tmp_path / f"out-{layers}", **FREEING)
    layer = 2 * (4 * 512 * 512 + 3 * 512 * 1792)  # bytes in 16 bits
    assert peaks[6] - peaks[2] < layer, peaks


def peak_of(script: str, *arguments: object, **environment: str) -> int:
    """Bytes of the largest resident set of a process that runs ``script``, which prints it in KiB."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) << 10
