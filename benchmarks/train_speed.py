"""Training speed of adapterhub beside plain transformers + peft and Unsloth, under one memory cap.

Synthetic weights, the same for all, in NF4 with doubly quantized scales; rank 64 on every linear; steps
of 16 rows; torch's allocator capped. Each stack runs in a process of its own, tries its settings in turn and
is judged by its best that fits. Needs a CUDA device::

python benchmarks/train_speed.py --model 7B --length 2048 [--stack ours peft unsloth] [--unsloth-python PATH]
[--setting 4,adamw,0,0] [--profile] [--out benchmarks/results/train_speed.json]

Results are written after every setting; ``--out`` keeps those of other models and lengths that are in it.
Ours runs the planner's choice for a card of the cap's size; ``--setting`` (micro-batch, optimizer, layers
recomputed whole, the MLP only, inputs offloaded, layers kept dequantized) adds others. Unsloth wants older
versions of its neighbours than adapterhub, hence its own python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from synthetic_model import MODELS, shape_of_size
from train_stacks import Job

# What was the fastest of each stack, by model and length; what does not fit is said and passed over.
PEFT: dict[str, list[dict[str, Any]]] = {
    "7B": [{"micro_batch": 2, "recompute": False}, {"micro_batch": 8, "recompute": True}],
    "13B": [{"micro_batch": 1, "recompute": False}, {"micro_batch": 8, "recompute": True}],
    "33B": [{"micro_batch": 4, "recompute": True}, {"micro_batch": 2, "recompute": True}],
    "65B": [{"micro_batch": rows, "recompute": True, "optimizer": "paged_adamw_8bit"} for rows in (2, 1)],
    "Gemma 2 9B": [{"micro_batch": 2, "recompute": True}],
    "Gemma 3 1B": [{"micro_batch": 2, "recompute": False}, {"micro_batch": 4, "recompute": True}],
}
UNSLOTH: dict[str, list[dict[str, Any]]] = {
    "7B": [{"micro_batch": 4, "recompute": False}, {"micro_batch": 8, "recompute": "unsloth"}],
    "13B": [{"micro_batch": 2, "recompute": False}, {"micro_batch": 8, "recompute": "unsloth"}],
    "33B": [{"micro_batch": 8, "recompute": "unsloth"}],
    "65B": [
        {"micro_batch": 8, "recompute": "unsloth", "optimizer": "paged_adamw_8bit", "bf16_adapters": True},
        {"micro_batch": 4, "recompute": "unsloth", "optimizer": "paged_adamw_8bit", "bf16_adapters": True},
    ],
}
BARS = {("7B", 2048): (1.2, 2.1), ("65B", 2048): (1.12, 1.3), ("65B", 512): (1.12, 1.3)}
HERE = Path(__file__).resolve().parent


def main() -> int:
    options = parse()
    results: list[dict[str, Any]] = []
    for stack in options.stack:
        results += run_stack(stack, options)
        write(options, results)
    show(options, results)
    return 0 if any("tokens_per_second" in line for line in results) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="7B")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    parser.add_argument("--documents", type=int, default=1, help="sequences a row, of equal length")
    parser.add_argument(
        "--stack", nargs="+", choices=["ours", "peft", "unsloth"], default=["ours", "peft", "unsloth"]
    )
    parser.add_argument(
        "--setting", action="append", default=[], help="another of ours, like 4,adamw,0,8,1,2"
    )
    parser.add_argument(
        "--engine", choices=["fast", "linears"], help="ours: for --setting, in place of the planner's"
    )
    parser.add_argument("--no-plan", action="store_true", help="ours: only what --setting gives")
    parser.add_argument("--unsloth-python", default=sys.executable)
    parser.add_argument("--cap", type=float, default=48.0, help="GiB that torch may take")
    parser.add_argument("--seconds", type=float, default=6.0, help="to time each setting")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a stack is stopped")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "train_speed.json")
    return parser.parse_args()


def run_stack(stack: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All settings of one stack in a process of its own; what it measured before it failed or was stopped
    counts.
    """
    job = Job(
        stack=stack, size=options.model, length=options.length, documents=options.documents,
        settings=settings_of(stack, options), cap_bytes=round(options.cap * 2**30), seconds=options.seconds,
        profile=options.profile,
    )  # fmt: skip
    python = options.unsloth_python if stack == "unsloth" else sys.executable
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        wanted, measured = Path(folder, "job.json"), Path(folder, "results.jsonl")
        wanted.write_text(json.dumps(asdict(job)))
        command = [python, str(HERE / "train_stacks.py"), str(wanted), str(measured)]
        ended: str | None = None
        try:
            done = subprocess.run(command, env=environment, timeout=options.limit, check=False)
            ended = f"exit code {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            ended = f"stopped after {options.limit:.0f} s"
        lines = [json.loads(line) for line in measured.read_text().splitlines()] if measured.exists() else []
    if ended:
        lines.append(
            {"kind": "setting", "stack": stack, "size": job.size, "length": job.length, "failed": ended}
        )
    return lines


def settings_of(stack: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    if stack == "ours":
        engine = {"engine": options.engine} if options.engine else {}
        given = [{**our_setting(text), **engine} for text in options.setting]
        return given if options.no_plan else [{"plan": True}, *given]
    settings = (PEFT if stack == "peft" else UNSLOTH).get(
        options.model, [{"micro_batch": 2, "recompute": True}]
    )
    rows = max(1, 2048 // options.length)  # as many tokens a micro-batch as at 2048
    return [{**setting, "micro_batch": min(16, setting["micro_batch"] * rows)} for setting in settings]


def our_setting(text: str) -> dict[str, Any]:
    rows, optimizer, whole, mlp, *more = text.split(",")
    offload, kept = [*more, "0", "0"][:2]
    return {
        "micro_batch": int(rows), "optimizer": optimizer, "recompute_all": int(whole),
        "recompute_mlp": int(mlp),
        "offload": offload == "1",
        "kept_weights": int(kept),
    }  # fmt: skip


def write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Replace this model's and length's results of the stacks that ran; keep the others."""
    ran = {(line["stack"], options.model, options.length, options.documents) for line in results}
    kept = []
    if options.out.exists():
        for line in json.loads(options.out.read_text())["results"]:
            if (line["stack"], line["size"], line["length"], line["documents"]) not in ran:
                kept.append(line)
    about = {"size": options.model, "length": options.length, "documents": options.documents}
    document = {
        "what": "tokens a second of whole optimizer steps of 16 rows, rank 64 on all linears, NF4",
        "cap_gib": options.cap,
        "results": kept + [{**about, **line} for line in results],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")


def show(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    rate = max((line["matrix_flops"] for line in results if line["kind"] == "machine"), default=0.0)
    shape = shape_of_size(options.model)
    weights = sum(linear.weights * linear.count for linear in shape.linears) + shape.vocab * shape.hidden
    print(
        f"\n{options.model}, {options.length} tokens a row; bf16 matrix rate {rate / 1e12:.0f} TFLOP/s",
        end="; ",
    )
    print(
        f"limit {rate / weights / 4:,.0f} tok/s with nothing recomputed, {rate / weights / 6:,.0f} with all"
    )
    best: dict[str, float] = {}
    for line in results:
        if line["kind"] == "machine":
            continue
        setting = line.get("setting", line.get("asked", {}))
        if "failed" in line:
            print(f"{line['stack']:8} {line['failed']}: {line.get('message', '')[:80]} {setting}")
            continue
        for name, ms, launches in line.get("profile", {}).get("kernels", [])[:25]:
            print(f"  {ms:9.2f} ms {launches:5} × {name}")
        if "profile" in line:
            print(
                "  "
                + ", ".join(f"{key} {line['profile'][key]}" for key in ("wall_ms", "launch_ms", "device_ms"))
            )
        speed = line["tokens_per_second"]
        best[line["stack"]] = max(speed, best.get(line["stack"], 0.0))
        peak = (line["peak_reserved_bytes"] + line["context_bytes"]) / 2**30
        said = (
            f" (predicted {line['predicted_peak_bytes'] / 2**30:.1f})" if line["predicted_peak_bytes"] else ""
        )
        share = speed * weights * 4 / rate if rate else 0.0
        print(
            f"{line['stack']:8} {speed:10,.0f} tok/s  {share:5.1%} of limit  {peak:5.1f} GiB{said} {setting}"
        )
    for other, bar in zip(
        ("unsloth", "peft"), BARS.get((options.model, options.length), (None, None)), strict=True
    ):
        if "ours" in best and other in best:
            print(
                f"ours is {best['ours'] / best[other]:.2f} × {other}" + (f", the bar is {bar}" if bar else "")
            )


if __name__ == "__main__":
    sys.exit(main())
