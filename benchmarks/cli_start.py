"""How long the command line takes to answer: ``adapterhub --help`` and others, as whole processes.

Run it on an idle machine::

    python benchmarks/cli_start.py [--runs 30] [--out benchmarks/results/cli_start.json]

Times are wall times in seconds, files in the page cache. hyperfine measures where it is installed, else a
loop over subprocesses; "measured_by" says which. Exits 1 when a median is over the bar.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine

ADAPTERHUB = Path(sys.executable).with_name("adapterhub")
COMMANDS = (("--help",), ("--version",), ("push", "--help"), ("pull", "--help"), ("verify", "--help"))
WARM_UPS = 3
BAR_SECONDS = 0.25


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cli_start.json")
    options = parser.parse_args()
    machine = describe_machine("adapterhub", "click", "pydantic")
    hyperfine = shutil.which("hyperfine")
    measured = {
        " ".join(("adapterhub", *arguments)): summarize(
            measure_with_hyperfine(hyperfine, arguments, options.runs)
            if hyperfine
            else measure_in_a_loop(arguments, options.runs)
        )
        for arguments in COMMANDS
    }
    result = {
        "what": __doc__.splitlines()[0],
        **machine,
        "measured_by": "hyperfine" if hyperfine else "a loop over subprocesses",
        "runs": options.runs,
        "bar_seconds": BAR_SECONDS,
        "commands": measured,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(measured, indent=2))
    slow = [name for name, summary in measured.items() if summary["median_seconds"] >= BAR_SECONDS]
    if slow:
        print(f"over the bar of {BAR_SECONDS} s: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


def measure_with_hyperfine(hyperfine: str, arguments: tuple[str, ...], runs: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "times.json"
        command = " ".join((str(ADAPTERHUB), *arguments))
        settings = [
            "--shell=none",
            "--warmup",
            str(WARM_UPS),
            "--runs",
            str(runs),
            "--export-json",
            str(export),
        ]
        subprocess.run([hyperfine, *settings, command], check=True, stdout=subprocess.DEVNULL)
        return [float(seconds) for seconds in json.loads(export.read_bytes())["results"][0]["times"]]


def measure_in_a_loop(arguments: tuple[str, ...], runs: int) -> list[float]:
    times = []
    for _ in range(WARM_UPS + runs):
        started = time.perf_counter()
        subprocess.run([ADAPTERHUB, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return times[WARM_UPS:]


def summarize(times: list[float]) -> dict[str, float]:
    return {
        "median_seconds": round(statistics.median(times), 4),
        "fastest_seconds": round(min(times), 4),
        "slowest_seconds": round(max(times), 4),
    }


if __name__ == "__main__":
    sys.exit(main())
