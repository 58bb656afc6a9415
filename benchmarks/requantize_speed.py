"""Re-quantizing a merged release beside bitsandbytes alone: weights a second.

A bf16 release of LLaMA shape with random weights is made on the disk and re-quantized, the whole of it: read,
checked, quantized, its scales too, written, hashed and sealed. Beside it stands what bitsandbytes' own
function takes for the same matrices in memory, one after another, the result thrown away: ``quantize_4bit``
with ``compress_statistics``, and ``int8_vectorwise_quant``. On a GPU where there is one. One command::

    python benchmarks/requantize_speed.py [--folder TMP] [--layers 3] [--repeats 2] [--to nf4 fp4 int8]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from machine import describe_machine
from merge_speed import HIDDEN, INTERMEDIATE, MODULES, VOCABULARY
from safetensors.torch import save_file

from adapterhub.load import default_device
from adapterhub.packaging.manifest import Manifest, Merge
from adapterhub.packaging.release import Release, new_release
from adapterhub.packaging.requantize import requantize_release

LAYERS_A_SHARD = 3
"""About 0.4 GB."""
FORMATS = ("nf4", "fp4", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to put a few GB for a while")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--to", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "requantize_speed.json"
    )
    options = parser.parse_args()
    device = default_device()
    weights = options.layers * sum(rows * columns for rows, columns in MODULES.values())
    result: dict[str, Any] = {
        "what": __doc__.splitlines()[0],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **describe_machine("adapterhub", "torch", "bitsandbytes"),
        "weights_quantized": weights,
        "repeats": options.repeats,
        "weights_a_second": {},
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source = make_release(folder / "merged", options.layers)
        for kind in options.to:
            seconds = {
                "requantize": best(
                    options.repeats, partial(requantize, source, folder / "out", kind, device)
                ),
                "bitsandbytes alone": best(options.repeats, partial(alone, options.layers, kind, device)),
            }
            speeds = {way: round(weights / taken) for way, taken in seconds.items()}
            ratio = round(speeds["requantize"] / speeds["bitsandbytes alone"], 2)
            result["weights_a_second"][kind] = {**speeds, "ratio": ratio}
            print(kind, json.dumps(result["weights_a_second"][kind]), flush=True)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def make_release(folder: Path, layers: int) -> Release:
    """A merged release of random weights, in shards."""
    draft = Manifest(
        name="requantize-speed",
        version="0.1.0",
        created=datetime.now(UTC),
        kind="merged",
        merge=Merge(onto="original"),
    )
    torch.manual_seed(0)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    with new_release(folder, draft) as staging:
        (staging / "config.json").write_text(json.dumps(config))
        index: dict[str, str] = {}

        def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
            save_file(tensors, staging / name, {"format": "pt"})
            index.update(dict.fromkeys(tensors, name))

        save("model-00000.safetensors", {"model.embed_tokens.weight": draw((VOCABULARY, HIDDEN))})
        for first in range(0, layers, LAYERS_A_SHARD):
            tensors = {
                f"model.layers.{layer}.{module}.weight": draw(shape)
                for layer in range(first, min(first + LAYERS_A_SHARD, layers))
                for module, shape in MODULES.items()
            }
            save(f"model-{first // LAYERS_A_SHARD + 1:05d}.safetensors", tensors)
        content = {"metadata": {"total_size": 0}, "weight_map": index}
        (staging / "model.safetensors.index.json").write_text(json.dumps(content))
    return Release.open(folder)


def draw(shape: tuple[int, int]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def requantize(source: Release, out: Path, kind: Any, device: str) -> float:
    """Seconds; rounded to nearest."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    requantize_release(source, out, storage=kind, device=device)
    return time.perf_counter() - began


def alone(layers: int, kind: str, device: str) -> float:
    """Seconds for as many matrices of each shape, on the device beforehand."""
    matrices = {shape: draw(shape).to(device) for shape in set(MODULES.values())}
    if kind == "int8" and device == "cuda":  # its kernel takes float16 alone
        matrices = {shape: matrix.half() for shape, matrix in matrices.items()}
    _wait(device)
    began = time.perf_counter()
    for _layer in range(layers):
        for shape in MODULES.values():
            if kind == "int8":
                bnb.int8_vectorwise_quant(matrices[shape])
            else:
                bnb.quantize_4bit(matrices[shape], compress_statistics=True, quant_type=kind)
    _wait(device)
    return time.perf_counter() - began


def best(repeats: int, run: Callable[[], float]) -> float:
    """The fastest, after one run to warm up."""
    run()
    return min(run() for _ in range(repeats))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
