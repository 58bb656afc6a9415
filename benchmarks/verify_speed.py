"""Hashing, signing and verifying beside openssl and the stock model_signing tool, on the same files.

`python benchmarks/verify_speed.py [--gigabytes 4] [--rounds 3]` makes a release of that size in eight shards
in a temporary folder, measures in turns, prints ratios, and writes results/verify_speed.json. The bars:
hashing at 0.9 times openssl's rate on one core times the cores; `sign` and `verify` no slower than
`model_signing sign` and `verify` with the same key; `verify` of a small adapter under 0.6 s as a process.
Beside wall times it records processor seconds, which say the same where others are at work ("load_before").
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from machine import describe_machine

from adapterhub.packaging.keys import KeyPair, generate_key
from adapterhub.packaging.manifest import BaseLock, Manifest
from adapterhub.packaging.release import Release, new_release

RESULT = Path(__file__).parent / "results" / "verify_speed.json"
SHARDS = 8
START_RUNS = 9
BARS = {"hash": 0.9, "sign": 1.0, "verify": 1.0, "verify_start_seconds": 0.6}
_ZEROS = "0" * 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of all shards, 10^9 bytes")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    machine = describe_machine("adapterhub", "model-signing", "cryptography")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ["XDG_CONFIG_HOME"] = str(scratch / "config")
        pair = generate_key(scratch / "keys")
        large = make_release(scratch / "large", int(options.gigabytes * 1e9 / SHARDS))
        small = make_release(scratch / "small", 128 * 1024)
        result = {
            **machine,
            "openssl": run("openssl", "version").stdout.strip(),
            "bytes": large.size,
            "shards": SHARDS,
            "rounds": options.rounds,
            "hashing": measure_hashing(large, options.rounds),
            "processes": measure_processes(large, pair, options.rounds),
            "verify_start": measure_start(small, pair),
            "bars": BARS,
        }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    return report(result)


def make_release(path: Path, shard_bytes: int) -> Release:
    """A release folder with ``SHARDS`` files of ``shard_bytes`` each, none like another."""
    base = BaseLock(name="none", digest=_ZEROS, weights={}, config_sha256=_ZEROS)
    draft = Manifest(name="speed", version="1.0.0", created=datetime(2026, 1, 1, tzinfo=UTC), base=base)
    block = os.urandom(1 << 20)
    with new_release(path, draft) as folder:
        for number in range(SHARDS):
            with (folder / f"part-{number}.safetensors").open("wb") as file:
                file.write(os.urandom(min(shard_bytes, 4096)))
                while (left := shard_bytes - file.tell()) > 0:
                    file.write(block[:left])
    return Release.open(path)


def measure_hashing(release: Release, rounds: int) -> dict[str, object]:
    """GB/s (10^9 bytes) of the check that every command makes, and of openssl in one process, warm."""
    files = [str(release.path / name) for name in sorted(release.manifest.files)]
    run("openssl", "dgst", "-sha256", *files)  # into the page cache
    ours, theirs = [], []
    for _round in range(rounds):
        theirs.append(time_of(lambda: run("openssl", "dgst", "-sha256", *files)))
        ours.append(time_of(release.check_files))
    cores = len(os.sched_getaffinity(0))
    rate, one_core = (release.size / median_of(times)["wall"] / 1e9 for times in (ours, theirs))
    return {
        "gb_per_s": rate,
        "openssl_one_core_gb_per_s": one_core,
        "cores": cores,
        "ratio_to_openssl_times_cores": rate / (one_core * cores),
        "processor_seconds_to_openssl": median_of(ours)["processor"] / median_of(theirs)["processor"],
        "seconds": ours,
        "openssl_seconds": theirs,
    }


def measure_processes(release: Release, pair: KeyPair, rounds: int) -> dict[str, object]:
    """Wall seconds of `sign` and `verify`, ours beside model_signing's, as whole processes, in turns."""
    signature = release.path / "model.sig"
    ours, stock = [sys.executable, "-m", "adapterhub"], [sys.executable, "-m", "model_signing"]
    at = ["--signature", str(signature)]
    commands = {
        "sign": [*ours, "sign", str(release.path), "--key", str(pair.private)],
        "verify": [*ours, "verify", str(release.path), "--key", str(pair.public)],
        "stock_sign": [*stock, "sign", "key", str(release.path), *at, "--private_key", str(pair.private)],
        "stock_verify": [*stock, "verify", "key", str(release.path), *at, "--public_key", str(pair.public)],
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _round in range(rounds):
        for name, command in commands.items():
            if name.endswith("sign"):
                signature.unlink(missing_ok=True)
            times[name].append(time_of(lambda command=command: run(*command)))
    middle = {name: median_of(found) for name, found in times.items()}
    return {
        "sign_speedup": middle["stock_sign"]["wall"] / middle["sign"]["wall"],
        "verify_speedup": middle["stock_verify"]["wall"] / middle["verify"]["wall"],
        "median_seconds": middle,
        "seconds": times,
    }


def measure_start(release: Release, pair: KeyPair) -> dict[str, object]:
    """Wall seconds of `adapterhub verify` of a small signed release, as a whole process."""
    run(sys.executable, "-m", "adapterhub", "sign", str(release.path), "--key", str(pair.private))
    verify = [sys.executable, "-m", "adapterhub", "verify", str(release.path), "--key", str(pair.public)]
    run(*verify)
    times = [time_of(lambda: run(*verify)) for _run in range(START_RUNS)]
    return {"bytes": release.size, "median_seconds": median_of(times), "seconds": times}


def report(result: dict) -> int:
    hashing, processes, start = result["hashing"], result["processes"], result["verify_start"]
    rows = [
        ("hash, share of openssl × cores", hashing["ratio_to_openssl_times_cores"], BARS["hash"]),
        ("sign, times as fast as stock", processes["sign_speedup"], BARS["sign"]),
        ("verify, times as fast as stock", processes["verify_speedup"], BARS["verify"]),
        ("verify start, s (at most)", start["median_seconds"]["wall"], BARS["verify_start_seconds"]),
    ]
    for words, value, bar in rows:
        print(f"{words:<32} {value:8.3f}   bar {bar}")
    print(f"{'hashing':<32} {hashing['gb_per_s']:8.3f} GB/s on {hashing['cores']} cores")
    for name, found in processes["median_seconds"].items():
        print(f"{name:<32} {found['wall']:8.3f} s, {found['processor']:.3f} s of processor")
    met = [value >= bar for _words, value, bar in rows[:3]] + [rows[3][1] < rows[3][2]]
    return 0 if all(met) else 1


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def time_of(act: Callable[[], object]) -> dict[str, float]:
    """Wall and processor seconds, those of processes that it started among them."""
    before, started = os.times(), time.perf_counter()
    act()
    wall, after = time.perf_counter() - started, os.times()
    return {"wall": wall, "processor": sum(after[:4]) - sum(before[:4])}


def median_of(times: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(time[key] for time in times) for key in ("wall", "processor")}


if __name__ == "__main__":
    sys.exit(main())
