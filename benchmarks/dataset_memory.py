"""``adapterhub push --type dataset`` on rows of growing size: peak memory and time, beside ``datasets``.

Run it on an idle machine::

    python benchmarks/dataset_memory.py [--megabytes 100 1000] [--out benchmarks/results/dataset_memory.json]

Each is a process of its own that ends with parquet files. Ours pushes to an embedded Hub what it has checked,
counted, searched for duplicates, personal data and overlap with a test split and with a benchmark (whose rows
stand among these), and written; ``datasets`` reads the same file with ``load_dataset("json")`` and writes it
with ``to_parquet``, and checks nothing. Peaks are resident memory in bytes. Exits 1 when ours grows by more
than 100 MiB from the first size to the last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import describe_machine
from sync import BIN, TOKEN, running_hub

GROWTH_BAR = 100 << 20  # bytes
PEER = """
import sys
from datasets import load_dataset
load_dataset("json", data_files=sys.argv[1], split="train").to_parquet(sys.argv[2])
"""


@dataclass(frozen=True)
class Cost:
    """One process, seen from outside."""

    seconds: float
    peak_bytes: int


def write_rows(path: Path, size: int) -> Path:
    """Chats of random words, some 1.5 KB each, until the file holds ``size`` bytes."""
    chance = random.Random(0)
    words = [
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(50_000)
    ]
    with path.open("w", encoding="utf-8") as out:
        written = 0
        while written < size:
            said = [" ".join(chance.choices(words, k=count)) for count in (150, 80)]
            messages = [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), said, strict=True)
            ]
            written += out.write(json.dumps({"messages": messages}) + "\n")
    return path


def run(command: list[str], environment: dict[str, str]) -> Cost:
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return Cost(round(time.perf_counter() - started, 1), used.ru_maxrss << 10)


def measure(folder: Path, megabytes: list[int]) -> list[dict[str, object]]:
    found = []
    benchmark = write_rows(folder / "benchmark.jsonl", 1_000_000)
    with running_hub(folder / "hub") as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        for size in megabytes:
            rows = write_rows(folder / "rows.jsonl", size * 1_000_000)
            options = ["--type", "dataset", "--test-share", "0.01", "--benchmark", str(benchmark)]
            ours = run(
                [str(BIN / "adapterhub"), "push", str(rows), f"ada/rows-{size}", *options], environment
            )
            peer = run([sys.executable, "-c", PEER, str(rows), str(folder / "peer.parquet")], environment)
            costs = {"adapterhub": asdict(ours), "datasets": asdict(peer)}
            found.append({"row_bytes": rows.stat().st_size, **costs})
            print(json.dumps(found[-1]), file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to put four times the rows for a while")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dataset_memory.json")
    options = parser.parse_args()
    machine = describe_machine("adapterhub", "datasets", "pyarrow", "numpy")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = measure(Path(folder), options.megabytes)
    growth = measured[-1]["adapterhub"]["peak_bytes"] - measured[0]["adapterhub"]["peak_bytes"]  # type: ignore[index]
    bar = {
        "bar": "peak memory, first size to last: bytes more",
        "found": growth,
        "most": GROWTH_BAR,
        "holds": growth <= GROWTH_BAR,
    }
    result = {"what": __doc__.splitlines()[0], **machine, "sizes": measured, "bars": [bar]}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(bar, indent=2))
    return 0 if bar["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
