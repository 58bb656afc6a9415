"""A merge takes no more memory for a deeper model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

# A process begins with its parent's peak, so a small one stands between this and the one that is measured.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak_of_merge(base: Path, adapter: Path, out: Path, onto: str, storage: str) -> int:
    """Bytes of the largest resident set of a process that does nothing else."""
    command = [
        sys.executable, "-m", "adapterhub", "merge", str(adapter), "--base", str(base), "--to", storage,
        "--onto", onto, "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("onto", "storage"), [("original", "bf16"), ("trained", "nf4")])
def test_memory_does_not_grow_with_the_layers(tmp_path: Path, onto: str, storage: str) -> None:
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    peaks, sizes = [], []
    for layers in (2, 14):
        base, adapter = tmp_path / f"base-{layers}", tmp_path / f"adapter-{layers}"
        config = LlamaConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=256,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
        LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(adapter)
        factors = {}
        for layer in range(layers):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
            factors |= {f"{name}_A.weight": torch.randn(4, 1024), f"{name}_B.weight": torch.randn(1024, 4)}
        save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
        peaks.append(peak_of_merge(base, adapter, tmp_path / f"out-{layers}", onto, storage))
        sizes.append((base / "model.safetensors").stat().st_size)
    grown = sizes[1] - sizes[0]  # 400 MB
    assert peaks[1] - peaks[0] < 0.1 * grown
