"""``adapterhub push`` and ``pull`` beside ``hf upload`` and ``hf download``, against one embedded Hub.

Run it on an idle machine::

    python benchmarks/sync.py [--folder TMP] [--gigabytes 1] [--runs 3] [--out benchmarks/results/sync.json]

Times are wall times of whole processes, imports included, the tools taking turns, each run into a new
repository and an empty cache; the best of the runs is compared. ``hf`` runs over git-lfs
(HF_HUB_DISABLE_XET=1), as adapterhub does against a Hub of one's own; ``hf, Xet`` is its default, where
hf_xet writes into the Hub's folder without the network. adapterhub checks every file against the manifest
before it sends and after it fetches; hf checks nothing. Both run compiled, as pip installs them: bytecode
goes to a folder of the benchmark, since a checkout may hold none. Requests and bytes are counted at a proxy,
in runs of their own. Exits 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from counting_proxy import Traffic, counting_proxy
from machine import describe_machine

BIN = Path(sys.executable).parent
TOKEN = "token-of-the-benchmark"
TIME_BAR, CARD_BAR, NO_OP_BAR, RESUME_BAR = 1.1, 3.0, 2, 1.05
TOOLS = ("adapterhub", "hf", "hf, Xet")
CUT_AT = 0.7


@dataclass(frozen=True)
class Cost:
    """One process, seen from outside."""

    seconds: float
    requests: int = 0
    sent_bytes: int = 0
    fetched_bytes: int = 0


@dataclass(frozen=True)
class Bench:
    """A Hub, a proxy before it, and a folder to work in."""

    folder: Path
    hub: str
    proxy: str
    traffic: Traffic

    def environment(self, tool: str, cache: Path, endpoint: str) -> dict[str, str]:
        inherited = {name: it for name, it in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return {
            **inherited,
            "PYTHONPYCACHEPREFIX": str(self.folder / "bytecode"),
            "HF_ENDPOINT": endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "0" if tool == "hf, Xet" else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "XDG_CONFIG_HOME": str(self.folder / "config"),
            "OMP_NUM_THREADS": "1",
        }

    def time(self, tool: str, command: list[str], cache: Path) -> Cost:
        """Run straight against the Hub."""
        os.sync()
        started = time.perf_counter()
        subprocess.run(
            command, env=self.environment(tool, cache, self.hub), check=True, capture_output=True, text=True
        )
        return Cost(round(time.perf_counter() - started, 3))

    def count(self, tool: str, command: list[str], cache: Path) -> Cost:
        """Run through the proxy."""
        self.traffic.reset()
        started = time.perf_counter()
        subprocess.run(
            command, env=self.environment(tool, cache, self.proxy), check=True, capture_output=True, text=True
        )
        seconds = round(time.perf_counter() - started, 3)
        return Cost(seconds, self.traffic.requests, self.traffic.sent, self.traffic.fetched)

    def cut(self, tool: str, command: list[str], cache: Path, after: int) -> Cost:
        """Run through the proxy, and kill the process once ``after`` bytes have come."""
        self.traffic.reset()
        started = time.perf_counter()
        with subprocess.Popen(
            command,
            env=self.environment(tool, cache, self.proxy),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while self.traffic.fetched < after and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        seconds = round(time.perf_counter() - started, 3)
        return Cost(seconds, self.traffic.requests, self.traffic.sent, self.traffic.fetched)


def push_command(tool: str, release: Path, repo: str) -> list[str]:
    if tool == "adapterhub":
        return [str(BIN / "adapterhub"), "push", str(release), repo]
    return [str(BIN / "hf"), "upload", repo, str(release)]


def pull_command(tool: str, repo: str) -> list[str]:
    if tool == "adapterhub":
        return [str(BIN / "adapterhub"), "pull", repo]
    return [str(BIN / "hf"), "download", repo]


@contextmanager
def running_hub(root: Path) -> Iterator[str]:
    command = [str(BIN / "adapterhub"), "hub", "serve", str(root), "--port", "0", "--user", "ada"]
    environment = {**os.environ, "ADAPTERHUB_HUB_TOKEN": TOKEN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("listening on ").strip()
        finally:
            process.terminate()


def make_release(path: Path, weight_bytes: int, small_files: int, version: str = "0.1.0") -> Path:
    """A release with one large file of random weights, a card, and many small files of evidence."""
    from adapterhub.packaging.manifest import Manifest
    from adapterhub.packaging.release import new_release

    draft = Manifest(
        name=path.name,
        version=version,
        created=datetime(2026, 1, 2, tzinfo=UTC),
        kind="merged",
        licence="apache-2.0",
    )
    with new_release(path, draft) as staging:
        (staging / "config.json").write_text('{"model_type": "llama"}')
        write_weights(staging / "model.safetensors", weight_bytes)
        (staging / "README.md").write_text(card(0))
        (staging / "evidence").mkdir()
        for number in range(small_files):
            body = {"row": number, "text": os.urandom(500 + number).hex()}
            (staging / "evidence" / f"{number:05}.json").write_text(json.dumps(body))
    return path


def write_weights(path: Path, size: int) -> None:
    """A safetensors file of one random int8 tensor."""
    header = json.dumps({"w": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while size > 0:
            size -= file.write(os.urandom(min(size, 1 << 24)))


def card(edition: int) -> str:
    """A card as large as those that `adapterhub card` makes (12 KB)."""
    line = "What was measured is listed in evidence/, what was not measured is named as such.\n"
    return f"---\nlicense: apache-2.0\n---\n\n# Edition {edition}\n\n" + line * 150


def change_card(release: Path, path: Path, version: str) -> Path:
    """The same release with another card and a version of its own; large files are links."""
    from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
    from adapterhub.packaging.release import Release

    shutil.copytree(release, path, copy_function=os.link)
    (path / MANIFEST_NAME).unlink()
    (path / "README.md").unlink()
    manifest = Manifest.read(release).model_copy(update={"version": version})
    (path / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    Release.open(path).with_files({"README.md": card(int(version.rpartition(".")[2])).encode()})
    return path


def first_push_and_pull(bench: Bench, release: Path, runs: int) -> dict[str, dict[str, list[Cost]]]:
    """Into a new repository, and from there into an empty cache; the tools take turns."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=bench.hub, token=TOKEN)
    found: dict[str, dict[str, list[Cost]]] = {"push": {}, "pull": {}}
    for run in range(runs):
        for tool in TOOLS:
            repo = f"ada/{release.name}-{TOOLS.index(tool)}-{run}"
            cache = bench.folder / "cache"
            pushed = bench.time(tool, push_command(tool, release, repo), cache)
            shutil.rmtree(cache, ignore_errors=True)
            pulled = bench.time(tool, pull_command(tool, repo), cache)
            found["push"].setdefault(tool, []).append(pushed)
            found["pull"].setdefault(tool, []).append(pulled)
            print(
                f"{release.name}, {tool}: push {pushed.seconds} s, pull {pulled.seconds} s", file=sys.stderr
            )
            shutil.rmtree(cache)
            api.delete_repo(repo)
    return found


def nothing_new(bench: Bench, release: Path, runs: int) -> dict[str, dict[str, list[Cost]]]:
    """A push and a pull of what is there already; the tools take turns."""
    caches = {tool: bench.folder / f"cache-{TOOLS.index(tool)}" for tool in TOOLS[:2]}
    found: dict[str, dict[str, list[Cost]]] = {"push": {}, "pull": {}}
    for run in range(runs + 1):
        for tool, cache in caches.items():
            repo = f"ada/same-{TOOLS.index(tool)}"
            pushed = bench.time(tool, push_command(tool, release, repo), cache)
            pulled = bench.time(tool, pull_command(tool, repo), cache)
            if run:  # the first one brings everything there, and compiles
                found["push"].setdefault(tool, []).append(pushed)
                found["pull"].setdefault(tool, []).append(pulled)
    for cache in caches.values():
        shutil.rmtree(cache)
    return found


def counted(bench: Bench, release: Path, tool: str) -> dict[str, Cost]:
    """No-op push and pull, a push of another card, and a pull that is killed and run again."""
    repo, cache = f"ada/counted-{TOOLS.index(tool)}", bench.folder / "cache"
    size = (release / "model.safetensors").stat().st_size
    bench.time(tool, push_command(tool, release, repo), cache)
    costs = {"no-op push": bench.count(tool, push_command(tool, release, repo), cache)}
    newer = change_card(release, bench.folder / f"newer-{TOOLS.index(tool)}", "0.1.1")
    costs["card-only push"] = bench.count(tool, push_command(tool, newer, repo), cache)
    shutil.rmtree(cache, ignore_errors=True)
    costs["pull, cut"] = bench.cut(tool, pull_command(tool, repo), cache, int(CUT_AT * size))
    costs["pull, again"] = bench.count(tool, pull_command(tool, repo), cache)
    costs["no-op pull"] = bench.count(tool, pull_command(tool, repo), cache)
    shutil.rmtree(cache)
    for name, cost in costs.items():
        print(f"{tool}, {name}: {cost}", file=sys.stderr)
    return costs


def best(costs: dict[str, list[Cost]]) -> dict[str, float]:
    return {tool: min(cost.seconds for cost in found) for tool, found in costs.items()}


def judge(timed: dict, counts: dict, release: Path) -> list[dict[str, object]]:
    """Every bar, what was found, and whether it holds."""
    verdicts = []
    for name, found in timed.items():
        times = best(found)
        verdicts.append((f"{name}: seconds over hf's", round(times["adapterhub"] / times["hf"], 3), TIME_BAR))
    ours = counts["adapterhub"]
    card_bytes = (release / "README.md").stat().st_size
    sent = round(ours["card-only push"].sent_bytes / card_bytes, 3)
    verdicts.append(("card-only push: bytes sent over the card's", sent, CARD_BAR))
    verdicts.append(("no-op pull: requests", ours["no-op pull"].requests, NO_OP_BAR))
    size = (release / "model.safetensors").stat().st_size
    fetched = ours["pull, cut"].fetched_bytes + ours["pull, again"].fetched_bytes
    verdicts.append(
        ("broken pull: bytes fetched in all over the file's", round(fetched / size, 4), RESUME_BAR)
    )
    return [
        {"bar": bar, "found": found, "most": most, "holds": found <= most} for bar, found, most in verdicts
    ]


def measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    large = make_release(folder / "large", int(options.gigabytes * 1e9), 0)
    many = make_release(folder / "many", 1000, options.small_files)
    with running_hub(folder / "hub") as hub, counting_proxy(hub) as (proxy, traffic):
        bench = Bench(folder, hub, proxy, traffic)
        counts = {tool: counted(bench, large, tool) for tool in TOOLS[:2]}
        timed = {f"no-op {way}": costs for way, costs in nothing_new(bench, large, 9).items()}
        for release, label in ((large, f"{options.gigabytes:g} GB"), (many, f"{options.small_files} files")):
            for way, costs in first_push_and_pull(bench, release, options.runs).items():
                timed[f"first {way}, {label}"] = costs
    seconds = {
        name: {tool: [cost.seconds for cost in found] for tool, found in costs.items()}
        for name, costs in timed.items()
    }
    return {
        "seconds": seconds,
        "counted": {
            tool: {name: asdict(cost) for name, cost in costs.items()} for tool, costs in counts.items()
        },
        "bars": judge(timed, counts, large),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to put some 10 GB for a while")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--small-files", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sync.json")
    options = parser.parse_args()
    machine = describe_machine("adapterhub", "huggingface-hub", "hf-xet", "httpx2", "uvicorn", "starlette")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = measure(Path(folder), options)
    result = {"what": __doc__.splitlines()[0], **machine, "runs": options.runs, **measured}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(measured["bars"], indent=2))
    return 0 if all(bar["holds"] for bar in measured["bars"]) else 1  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
