"""Write docs/scaling.md from the ledger and the measured speeds; with --check, fail when it is old."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.activations import Setting
from adapterhub.trainer.hardware import described_gpu
from adapterhub.trainer.ledger import GIB, ledger
from adapterhub.trainer.plan import default_reserve, plan
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import ModelShape, shape_of

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PAGE = DOCS / "scaling.md"
CARDS = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9, "141 GB": 141e9}
LENGTHS = (512, 2048, 8192)
RANK = 64
# hidden, layers, heads, key-value heads, intermediate, vocabulary.
MODELS = {
    "7B": (4096, 32, 32, 32, 11008, 32000),
    "13B": (5120, 40, 40, 40, 13824, 32000),
    "33B": (6656, 60, 52, 52, 17920, 32000),
    "65B": (8192, 80, 64, 64, 22016, 32000),
    "70B (LLaMA 3)": (8192, 80, 64, 8, 28672, 128256),
    "405B (LLaMA 3.1)": (16384, 126, 128, 8, 53248, 128256),
}
# QLoRA, table 9 and appendix B.4: OASST1's top replies, at most 512 tokens each.
GUANACO_ROWS, GUANACO_STEPS, GUANACO_BATCH, GUANACO_LENGTH = 9209, 1875, 16, 512
INTRODUCTION = """# What fits where

<!-- Made by docs/scaling.py from the ledger and benchmarks/results; `make lint` fails when it is old. -->

Every figure of memory on this page is **predicted** by the memory ledger: NF4 with double quantization,
rank {rank} on all linear layers, 2 % of the card in reserve. `adapterhub plan BASE --gpu 48GB` gives the
same for your model with all its parts. GB are 10⁹ bytes. The ledger was held against measured peaks of
{accuracy}
([ledger_accuracy.json](../benchmarks/results/ledger_accuracy.json), where two of its constants were fitted).
"""
ONE = """## One card

In each cell: predicted peak in GB, the micro-batch (rows × tokens) of the fastest plan that fits, and how
many layers it recomputes (whole + the MLP alone).
"""
SEVERAL = """## Two to eight cards with FSDP

`accelerate launch --use_fsdp --num_processes N -m adapterhub train RECIPE.yaml` at its smallest setting,
so that a cell says whether it fits at all: micro-batch 1, transformers' own engine, every layer
recomputed; base, adapter and optimizer divided among the cards, two layers and the embeddings whole on
each. In each cell: predicted peak of each card in GB. **Not measured**, these peaks: that FSDP trains
what one process does, and goes on from one GPU to two, was tested on two CPU processes and on two H200
over NCCL (`tests/trainer/test_distributed.py`), on a small model.
"""
SPEED = """## Guanaco's run

{rows:,} rows, {steps:,} steps of {batch}, at most {length} tokens: at most {tokens:.1f} M tokens, so the
time is an upper bound. **Computed** from the tokens a second that were measured at length 2,048 on an
H200 whose allocator was capped at 48 GiB ([train_speed.json](../benchmarks/results/train_speed.json));
no run of this length was made. Evaluation and checkpoints come on top. Other cards were not measured.

| model | tokens/s, measured | hours, computed | predicted peak of that plan, GB | measured peak, GB |
|---|---|---|---|---|
"""
RUNS = """## What `train` runs

One process on one GPU or CPU; or several, which `accelerate launch` or `torchrun` starts and which share
the batch. Without `--use_fsdp` each of them has the whole base, and each card needs what one card needs.
Several processes use transformers' own engine, not the fast path. FSDP takes NF4, FP4 and 16-bit bases
with LoRA, rsLoRA and LoftQ; int8, DoRA, PiSSA, new tokens and paged optimizers are refused with it. The
speed of several GPUs was not measured; that two find one's losses was ([training.md](training.md)).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is old")
    text = scaling_page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("error: docs/scaling.md does not match the ledger\nfix: make docs", file=sys.stderr)
        return 1
    return 0


def scaling_page() -> str:
    """The page's text."""
    tokens = GUANACO_STEPS * GUANACO_BATCH * GUANACO_LENGTH
    speed = SPEED.format(
        rows=GUANACO_ROWS,
        steps=GUANACO_STEPS,
        batch=GUANACO_BATCH,
        length=GUANACO_LENGTH,
        tokens=tokens / 1e6,
    )
    parts = [
        INTRODUCTION.format(rank=RANK, accuracy=accuracy()),
        ONE,
        "\n".join(one_card()) + "\n",
        SEVERAL,
        "\n".join(several_cards()) + "\n",
        speed + "\n".join(guanaco(tokens)) + "\n",
        RUNS,
    ]
    return "\n".join(parts)


def one_card() -> Iterator[str]:
    yield "| model | length | " + " | ".join(CARDS) + " |"
    yield "|---|---|" + "---|" * len(CARDS)
    for name in MODELS:
        for length in LENGTHS:
            cells = [planned(model(name), length, described_gpu(int(size))) for size in CARDS.values()]
            yield f"| {name} | {length:,} | " + " | ".join(cells) + " |"


def planned(shape: ModelShape, length: int, card: Hardware) -> str:
    made = plan(shape, recipe(length), card)
    if not made.fits:
        return "no"
    setting = made.setting
    again = f"{setting.recompute_all}+{setting.recompute_mlp} of {shape.layers}"
    if not setting.recompute_all and not setting.recompute_mlp:
        again = "none"
    return f"{made.predicted_peak_bytes / 1e9:.1f}: {setting.micro_batch} × {length:,}, {again}"


def several_cards() -> Iterator[str]:
    counts = (2, 4, 8)
    columns = [f"{count} × {card}" for card in CARDS for count in counts]
    yield "| model | length | " + " | ".join(columns) + " |"
    yield "|---|---|" + "---|" * len(columns)
    for name in MODELS:
        for length in LENGTHS:
            cells = [
                sharded(model(name), length, described_gpu(int(size)), count)
                for size in CARDS.values()
                for count in counts
            ]
            yield f"| {name} | {length:,} | " + " | ".join(cells) + " |"


def sharded(shape: ModelShape, length: int, card: Hardware, count: int) -> str:
    setting = Setting(1, "adamw", "plain", recompute_all=shape.layers)
    peak = ledger(shape, recipe(length), card, replace(setting, shards=count)).predicted_peak_bytes
    return f"{peak / 1e9:.1f}" if peak + default_reserve(card) <= card.memory_bytes else "no"


def guanaco(tokens: int) -> Iterator[str]:
    """A line for each model whose planned setting was timed."""
    for line in read("train_speed"):
        if line["stack"] == "ours" and "tokens_per_second" in line and line["documents"] == 1:
            speed = line["tokens_per_second"]
            measured = line["peak_reserved_bytes"] + line["context_bytes"]
            peaks = f"{line['predicted_peak_bytes'] / 1e9:.1f} | {measured / 1e9:.1f}"
            yield f"| {line['size']} | {speed:,.0f} | {tokens / speed / 3600:.2f} | {peaks} |"


def accuracy() -> str:
    """How far the ledger of today is off what was measured, and on what, in words."""
    errors, sizes, devices = [], [], []
    for line in read("ledger_accuracy"):
        if line["kind"] == "machine":
            devices.append(line["device"])
        if "peak_reserved_bytes" in line and line["setting"]["engine"] == "fast":  # what this page plans
            card = Hardware(device="cuda", name=line["size"], memory_bytes=48 * GIB)
            found = ledger(model(line["size"]), recipe(line["length"]), card, Setting(**line["setting"]))
            measured = line["peak_reserved_bytes"] + line["context_bytes"]
            errors.append(abs(found.predicted_peak_bytes / measured - 1))
            sizes.append(line["size"])
    cards = " and ".join(f"one {name}" for name in dict.fromkeys(devices))
    return (
        f"{', '.join(dict.fromkeys(sizes))} on {cards}:\n{len(errors)} settings, the largest error "
        f"{max(errors):.1%}"
    )


def read(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_bytes())["results"]
    return found


def recipe(length: int) -> Recipe:
    content = {
        "name": "scaling",
        "base": "base",
        "data": {"train": "rows", "max_length": length},
        "lora": {"rank": RANK},
        "training": {"batch_size": GUANACO_BATCH},
    }
    return Recipe.from_dict(content, DOCS)


def model(name: str) -> ModelShape:
    hidden, layers, heads, kv_heads, intermediate, vocabulary = MODELS[name]
    return shape_of(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate,
            "vocab_size": vocabulary,
        }
    )


if __name__ == "__main__":
    sys.exit(main())
