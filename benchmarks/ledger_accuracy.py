"""The ledger's predicted peak beside the measured one: LLaMA 7B to 65B and Gemma, at least three settings
each, on CUDA.

Two micro-batches and two optimizer steps a setting, by the planner's engine, on synthetic weights, rank 64 on
every linear. Measured is torch's peak of reserved bytes plus the CUDA context (what the device says is used,
less what torch reserved). Results are written after every model; those of other models stay in the file::

python benchmarks/ledger_accuracy.py [--model 7B 13B 33B 65B] [--out benchmarks/results/ledger_accuracy.json]
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

from synthetic_model import MODELS
from train_speed import our_setting
from train_stacks import Job

# Length and settings (see train_speed's --setting); each fits 48 GiB.
SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {
    "7B": (2048, ("4,adamw,0,0", "8,adamw,4,28", "8,paged_adamw,32,0,1", "4,adamw,0,0,0,16")),
    "13B": (2048, ("2,adamw,0,0", "4,adamw,0,30", "4,paged_adamw_8bit,40,0")),
    "33B": (1024, ("2,adamw,0,0", "4,paged_adamw,20,40", "4,adamw,60,0,1", "1,adamw,0,0,0,4")),
    "65B": (512, ("4,paged_adamw,40,40", "8,paged_adamw,80,0,1", "2,paged_adamw_8bit,0,80")),
    "Gemma 2 9B": (1024, ("2,adamw,0,0", "8,adamw,42,0", "16,paged_adamw,42,0")),
    "Gemma 3 1B": (2048, ("8,adamw,0,0", "4,adamw,0,0", "16,adamw,26,0")),
}
# Sequences a row, as packing makes them: with several, transformers makes masks.
DOCUMENTS = 4
BAR = 0.03
HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(SETTINGS))
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which a model is stopped")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ledger_accuracy.json")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    kept = others(options.out, options.model)
    for size in options.model:
        results += measure(size, options.limit)
        write(options.out, kept + results)
    rows = [line for line in results if "relative_error" in line]
    for line in rows:
        peaks = [line[name] / 2**30 for name in ("predicted_peak_bytes", "measured_peak_bytes")]
        print(f"{line['size']:10} predicted {peaks[0]:6.2f} GiB, measured {peaks[1]:6.2f}", end=" GiB, ")
        print(f"{line['relative_error']:+.1%}  {line['setting']}")
    worst = max((abs(line["relative_error"]) for line in rows), default=1.0)
    print(f"the largest error is {worst:.1%}; the bar is {BAR:.0%}")
    return 0 if worst <= BAR and len(rows) == sum(len(SETTINGS[size][1]) for size in options.model) else 1


def measure(size: str, limit: float) -> list[dict[str, Any]]:
    length, settings = SETTINGS[size]
    asked = [our_setting(text) for text in settings]
    job = Job("ours", size, length, DOCUMENTS, asked, 48 * 2**30, 0.0, False)
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        wanted, measured = Path(folder, "job.json"), Path(folder, "results.jsonl")
        wanted.write_text(json.dumps(asdict(job)))
        command = [sys.executable, str(HERE / "train_stacks.py"), str(wanted), str(measured)]
        try:
            subprocess.run(command, env=environment, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            print(f"{size}: stopped after {limit:.0f} s", file=sys.stderr)
        lines = [json.loads(line) for line in measured.read_text().splitlines()] if measured.exists() else []
    for line in lines:
        if "peak_reserved_bytes" in line:
            line["measured_peak_bytes"] = line["peak_reserved_bytes"] + line["context_bytes"]
            line["relative_error"] = line["predicted_peak_bytes"] / line["measured_peak_bytes"] - 1
    return lines


def others(out: Path, models: list[str]) -> list[dict[str, Any]]:
    """What the file has of other models, each with the machine that it was measured on."""
    if not out.exists():
        return []
    kept: list[dict[str, Any]] = []
    machine: dict[str, Any] | None = None
    for line in json.loads(out.read_text())["results"]:
        if line["kind"] == "machine":
            machine = line
        elif line["size"] not in models:
            kept += [machine, line] if machine else [line]
            machine = None
    return kept


def write(out: Path, results: list[dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    what = "peak of reserved bytes and the CUDA context, predicted and measured; torch capped at 48 GiB"
    out.write_text(json.dumps({"what": what, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
