"""What speed and quantization cost in quality: held-out loss after training one adapter in several ways.

Every run of a seed draws the same adapter and sees the same rows in the same order; what differs is the
base's number format, or who trains: adapterhub's fast path (``fast``), or peft and transformers as they are.
The held-out loss is always the plain model's: base and adapter apart, bf16 autocast. Results are written
after every run::

python benchmarks/quality.py BASE --data FOLDER [--variants fast nf4] [--seeds 0] [--steps 150]
[--with EARLIER.json …] [--out benchmarks/results/quality.json]

Runs of the same task in the files that ``--with`` names count as made: none is made twice, all are summed up.

FOLDER holds ``train*.jsonl`` and ``test*.jsonl`` or ``*_train*.jsonl`` and ``*_test*.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adapterhub.packaging.manifest import Quantization
from adapterhub.trainer.activations import Setting
from adapterhub.trainer.data import read_rows
from adapterhub.trainer.fast.install import FastPath, install_blocks
from adapterhub.trainer.initial import start_from_quantization_error
from adapterhub.trainer.model import attach_adapter, load_base, load_tokenizer
from adapterhub.trainer.packing import PackedRow, collate, pack
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.template import IGNORED, encode

BAR = 0.005
ROWS, MICRO_ROWS = 16, 8
VARIANTS: dict[str, Quantization | None] = {
    "fast": Quantization(),
    "nf4": Quantization(),
    "nf4, scales in fp32": Quantization(double=False),
    "fp4": Quantization(type="fp4"),
    "int8": Quantization(type="int8"),
    "bf16": None,
    "loftq": Quantization(),
}
# 97.5 % points of Student's t for 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """What every variant is trained and judged on."""

    base: Path
    train: list[Any]
    held_out: list[PackedRow]
    pad: int
    recipe: Recipe
    steps: int
    every: int
    """Optimizer steps between held-out losses."""
    device: torch.device
    rows: int


def main() -> int:
    options = parse()
    began = time.monotonic()
    task = read_task(options)
    runs = [run for file in options.earlier for run in earlier_runs(file, task)]
    made = {(run["variant"], run["seed"]) for run in runs}
    write(options.out, task, runs)
    longest = 0.0
    for seed in options.seeds:
        for variant in options.variants:
            if (variant, seed) in made:
                continue
            if time.monotonic() - began + longest > options.budget:
                print(f"left out for want of time: {variant}, seed {seed}", file=sys.stderr)
                continue
            runs.append(run(task, variant, seed))
            longest = max(longest, runs[-1]["seconds"])
            said = ", ".join(f"{point['step']}: {point['loss']:.4f}" for point in runs[-1]["held_out"])
            print(f"{variant:20} seed {seed}  {runs[-1]['seconds']:5.1f} s  held-out {said}", flush=True)
            write(options.out, task, runs)
    summary = summarize(runs)
    for line in summary["variants"]:
        width = "not known" if line["interval"] is None else f"{line['interval']:.4f}"
        print(f"{line['variant']:20} {line['loss']:.4f} ± {width} (n={line['seeds']})")
    worst = summary["fast_against_plain"]
    if worst is None:
        return 0
    print(
        f"fast path against plain, largest difference of a held-out loss: {worst:.3%}; the bar is {BAR:.1%}"
    )
    return 0 if worst <= BAR else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["fast", "nf4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=50, help="steps between held-out losses")
    parser.add_argument("--rows", type=int, default=ROWS, help="packed rows an optimizer step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row at most")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds; no run begins that ends later"
    )
    parser.add_argument("--with", dest="earlier", type=Path, nargs="+", default=[], metavar="EARLIER.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quality.json")
    return parser.parse_args()


def read_task(options: argparse.Namespace) -> Task:
    tokenizer = load_tokenizer(options.base)
    encoded = {}
    for split in ("train", "test"):
        (file,) = sorted({*options.data.glob(f"{split}*.jsonl"), *options.data.glob(f"*_{split}*.jsonl")})
        examples = [encode(tokenizer, row.messages) for row in read_rows(file)]
        encoded[split] = [example for example in examples if len(example.input_ids) <= options.length]
    content = {
        "name": "quality", "base": "base", "data": {"train": "train", "max_length": options.length},
        "lora": {"rank": options.rank, "alpha": 2 * options.rank, "target_modules": "all-linear"},
        "training": {
            "batch_size": options.rows, "learning_rate": options.learning_rate, "max_grad_norm": 0.3,
        },
    }  # fmt: skip
    return Task(
        base=options.base,
        train=encoded["train"],
        held_out=pack(encoded["test"], options.length, seed=0),
        pad=int(tokenizer.pad_token_id),
        recipe=Recipe.from_dict(content, Path()),
        steps=options.steps,
        every=options.every,
        device=torch.device(options.device),
        rows=options.rows,
    )


def run(task: Task, variant: str, seed: int) -> dict[str, Any]:
    """Train one adapter; the held-out loss before, at intervals and after."""
    began = time.monotonic()
    base = load_base(task.base, VARIANTS[variant], "cuda" if task.device.type == "cuda" else "cpu")
    model = attach_adapter(base, task.recipe.lora, seed=seed)
    if variant == "loftq":
        start_from_quantization_error(model, task.base)
    step = fast_step(task, model) if variant == "fast" else plain_step(task, model)
    curve = [{"step": 0, "loss": held_out_loss(task, model)}]
    losses = []
    for index, rows in enumerate(batches(task, seed), 1):
        model.train()
        losses.append(step(rows))
        if index % task.every == 0 or index == task.steps:
            curve.append({"step": index, "loss": held_out_loss(task, model)})
    return {
        "variant": variant,
        "seed": seed,
        "held_out": curve,
        "train": [round(float(loss), 5) for loss in losses],
        "seconds": round(time.monotonic() - began, 1),
        "device": torch.cuda.get_device_name() if task.device.type == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }


def batches(task: Task, seed: int) -> Iterator[list[PackedRow]]:
    """The rows of each step: pass after pass, packed anew by the seed and the pass."""
    rows: list[PackedRow] = []
    passes = 0
    for _ in range(task.steps):
        while len(rows) < task.rows:
            rows += pack(task.train, task.recipe.data.max_length, seed=1000 * seed + passes)
            passes += 1
        yield rows[: task.rows]
        rows = rows[task.rows :]


def fast_step(task: Task, model: Any) -> Callable[[list[PackedRow]], Any]:
    """Two micro-batches a step, so that kept weights are used again; one layer in three recomputes."""
    layers = len(model.get_base_model().model.layers)
    setting = Setting(
        MICRO_ROWS, "adamw", "fast", recompute_all=layers // 6, recompute_mlp=layers // 6, kept_weights=layers
    )
    dtype = model.get_input_embeddings().weight.dtype  # bf16, or float32 on processors that lack it
    fast = install_blocks(model.get_base_model(), setting, dtype, task.device)
    optimizer = fast.optimizer(task.recipe, setting)

    def step(rows: list[PackedRow]) -> Any:
        count = loss_tokens(rows)
        total = torch.zeros((), device=task.device)
        for start in range(0, len(rows), MICRO_ROWS):
            batch = FastPath.prepare(collate(rows[start : start + MICRO_ROWS], task.pad))
            loss = model(**to_device(batch, task.device), num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return total

    return step


def plain_step(task: Task, model: Any) -> Callable[[list[PackedRow]], Any]:
    """peft and transformers under bf16 autocast, torch's fused AdamW on fp32 adapters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = task.recipe.training
    optimizer = torch.optim.AdamW(
        parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )

    def step(rows: list[PackedRow]) -> Any:
        batch = to_device(collate(rows, task.pad), task.device)
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.device.type == "cuda"):
            loss = model(**batch, num_items_in_batch=loss_tokens(rows), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@torch.no_grad()
def held_out_loss(task: Task, model: Any) -> float:
    """Mean negative log-likelihood of the held-out rows' answers, in nats a token, by the plain model.

    Without labels an installed fast path stands aside, so logits are those of base and adapter apart.
    """
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(task.held_out), ROWS):
        batch = to_device(collate(task.held_out[start : start + ROWS], task.pad), task.device)
        labels = batch.pop("labels")[:, 1:]
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.device.type == "cuda"):
            logits = model(**batch, use_cache=False).logits[:, :-1]
        kept = labels != IGNORED
        total += float(torch.nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum"))
        count += int(kept.sum())
    return total / count


def loss_tokens(rows: list[PackedRow]) -> int:
    return sum(label != IGNORED for row in rows for label in row.labels[1:])


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Final losses by variant with 95 % intervals over seeds, differences to nf4 seed by seed, and the
    largest relative difference between the fast path's and the plain held-out losses.
    """
    final = {(run["variant"], run["seed"]): run["held_out"][-1]["loss"] for run in runs}
    lines = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        losses = [loss for (name, _), loss in final.items() if name == variant]
        paired = [
            loss - final["nf4", seed]
            for (name, seed), loss in final.items()
            if name == variant and ("nf4", seed) in final
        ]
        lines.append(
            {
                "variant": variant,
                "seeds": len(losses),
                "untrained": next(run["held_out"][0]["loss"] for run in runs if run["variant"] == variant),
                "loss": statistics.mean(losses),
                "interval": interval(losses),
                "above_nf4": statistics.mean(paired) if paired else None,
                "above_nf4_interval": interval(paired),
            }
        )
    curves = {(run["variant"], run["seed"]): run["held_out"] for run in runs}
    differences = [
        abs(fast["loss"] / plain["loss"] - 1)
        for (variant, seed), curve in curves.items()
        if variant == "fast" and ("nf4", seed) in curves
        for fast, plain in zip(curve, curves["nf4", seed], strict=True)
    ]
    return {"variants": lines, "fast_against_plain": max(differences, default=None), "bar": BAR}


def interval(values: list[float]) -> float | None:
    """Half the width of the mean's 95 % interval by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    return STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def write(out: Path, task: Task, runs: list[dict[str, Any]]) -> None:
    document = {
        "what": "held-out loss in nats a token, by the plain model, of adapters trained on equal rows",
        "task": described(task),
        "summary": summarize(runs),
        "runs": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


def described(task: Task) -> dict[str, Any]:
    return {
        "steps": task.steps,
        "rows_a_step": task.rows,
        "max_length": task.recipe.data.max_length,
        "rank": task.recipe.lora.rank,
        "learning_rate": task.recipe.training.learning_rate,
        "train_examples": len(task.train),
        "held_out_rows": len(task.held_out),
    }


def earlier_runs(file: Path, task: Task) -> list[dict[str, Any]]:
    """The runs that ``file`` records, each with device and versions; they must be of the same task."""
    document = json.loads(file.read_text())
    if document["task"] != described(task):
        sys.exit(f"{file} is of another task: {document['task']}")
    machine = {name: document[name] for name in ("device", "versions") if name in document}
    return [machine | run for run in document["runs"]]


if __name__ == "__main__":
    sys.exit(main())
