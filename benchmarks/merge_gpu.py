"""A 7B merged to NF4 on a GPU: seconds and peak memory, rounded to nearest and with codes chosen on text.

A LLaMA of 7B shape with random bfloat16 weights in 1 GB shards is made on the disk, and an adapter of
rank 64 on every linear layer. Choosing codes is run on the first layers only and stopped: what all layers
would take at that pace is told beside it. One command, on a machine with a GPU and 25 GB of disk::

    python benchmarks/merge_gpu.py [--folder TMP] [--out benchmarks/results/merge_gpu.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from safetensors.torch import save_file
from synthetic_model import SIZES, VOCABULARY, config_of

from adapterhub.packaging.calibration.calibrate import CalibrationText
from adapterhub.packaging.merge import merge_adapter
from adapterhub.version import __version__

RANK = 64
LAYERS_A_SHARD = 3
"""About 1.2 GB of a 7B."""
ROWS, LENGTH = 64, 256
"""Calibration texts, of random tokens: speed does not depend on what they say."""


class _Enough(Exception):
    """As many layers as were to be timed are done."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="7B", choices=sorted(SIZES))
    parser.add_argument("--folder", type=Path, help="Where to work. Default: a temporary folder.")
    parser.add_argument("--layers", type=int, default=4, help="Layers to choose codes for.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_gpu.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        made = _timed(lambda: make_base(folder / "base", arguments.size, device))
        make_adapter(folder / "adapter", arguments.size)
        result = {
            "what": f"LLaMA {arguments.size}, random bf16 weights, LoRA of rank {RANK} on all linear layers",
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "adapterhub": __version__,
            **describe_machine("torch", "transformers", "bitsandbytes"),
            "seconds_to_make_the_checkpoint": made,
            "nearest": {onto: nearest(folder, onto, device) for onto in ("original", "trained")},
            "calibrated": calibrated(folder, device, arguments.layers),
        }
    text = json.dumps(result, indent=2)
    print(text)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(text + "\n")


def nearest(folder: Path, onto: Any, device: str) -> dict[str, float]:
    """One merge to NF4 by rounding to nearest."""
    out = folder / f"nf4-{onto}"
    _forget_peak(device)
    seconds = _timed(
        lambda: merge_adapter(
            folder / "adapter", folder / "base", out, onto=onto, storage="nf4", device=device
        )
    )
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    for path in out.iterdir():
        path.unlink()
    return {"seconds": seconds, "bytes_written": size, **_peaks(device)}


def calibrated(folder: Path, device: str, layers: int) -> dict[str, Any]:
    """The first ``layers`` decoder layers of a merge with chosen codes."""
    torch.manual_seed(0)
    texts = torch.randint(3, VOCABULARY, (ROWS, LENGTH)).tolist()
    began = time.perf_counter()
    ends: list[float] = []
    all_layers = 0

    def report(done: int, total: int) -> None:
        nonlocal all_layers
        ends.append(time.perf_counter() - began)
        all_layers = total
        if done >= layers:
            raise _Enough

    _forget_peak(device)
    with suppress(_Enough):
        merge_adapter(
            folder / "adapter",
            folder / "base",
            folder / "calibrated",
            onto="trained",
            storage="nf4",
            device=device,
            calibration=CalibrationText("random tokens", "0" * 64, texts, report),
        )
    each = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else ends[0]
    return {
        "tokens": ROWS * LENGTH,
        "layers_done": len(ends),
        "seconds": round(ends[-1], 2),
        "seconds_a_layer": round(each, 2),
        "all_layers_at_that_pace_seconds": round(ends[0] + each * (all_layers - 1), 1),
        **_peaks(device),
    }


def make_base(folder: Path, size: str, device: str) -> None:
    """A checkpoint of random weights, sharded."""
    hidden, layers, _heads, intermediate = SIZES[size]
    folder.mkdir()
    config = {**config_of(size), "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02).cpu()

    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    save(
        "model-00000.safetensors",
        {
            "model.embed_tokens.weight": draw(VOCABULARY, hidden),
            "lm_head.weight": draw(VOCABULARY, hidden),
            "model.norm.weight": ones,
        },
    )
    for first in range(0, layers, LAYERS_A_SHARD):
        tensors = {}
        for layer in range(first, min(first + LAYERS_A_SHARD, layers)):
            for module, (rows, columns) in _modules(hidden, intermediate).items():
                tensors[f"model.layers.{layer}.{module}.weight"] = draw(rows, columns)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = ones.clone()
        save(f"model-{first // LAYERS_A_SHARD + 1:05d}.safetensors", tensors)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def make_adapter(folder: Path, size: str) -> None:
    """A plain PEFT folder with random factors."""
    hidden, layers, _heads, intermediate = SIZES[size]
    folder.mkdir()
    modules = _modules(hidden, intermediate)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted(module.rpartition(".")[2] for module in modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for module, (rows, columns) in modules.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK) * 0.001
    save_file(tensors, folder / "adapter_model.safetensors")


def _modules(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    square, wide = (hidden, hidden), (intermediate, hidden)
    return {
        "self_attn.q_proj": square,
        "self_attn.k_proj": square,
        "self_attn.v_proj": square,
        "self_attn.o_proj": square,
        "mlp.gate_proj": wide,
        "mlp.up_proj": wide,
        "mlp.down_proj": (hidden, intermediate),
    }


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 2)


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peaks(device: str) -> dict[str, float]:
    """Largest so far: the process's resident set since its start, the GPU's memory since ``_forget_peak``."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"peak_rss_gb_so_far": round(kilobytes * 1024 / 1e9, 2)}
    if device == "cuda":
        found["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found


if __name__ == "__main__":
    sys.exit(main())
