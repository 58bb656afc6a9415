"""The whole way on a real model: plan, train, evaluate, card, sign, push, pull, load, merge.

    python examples/orders/demo.py [--base OWNER/NAME] [--folder demo]

Every step is an ordinary command, echoed so that you can type it yourself in the demo's folder. What is there
already is used again. The first step that fails ends the demo with its own exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
BASE = "smollm2-135m-instruct"
RELEASE = "smollm2-orders"
MERGED = "smollm2-orders-merged"
REPO = f"demo/{RELEASE}"
MOST_FOR_BASE, LEAST_FOR_ADAPTER = 0.10, 0.70


class Demo:
    """Runs commands in the demo's folder, with its own configuration and cache, and keeps their times."""

    def __init__(self, folder: Path, base: str | None) -> None:
        self.folder = folder
        self.base = base
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self.environment = os.environ | {
            "XDG_CONFIG_HOME": str(folder / "config"),  # trusted keys
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        if base is None:
            self.environment["HF_HOME"] = str(folder / "cache")

    def run(self, step: str, command: str, **extra: str) -> str:
        """Echo and run one command line; its stdout is shown and returned. Ends the demo when it fails."""
        shown = "".join(f"{name}={value} " for name, value in extra.items())
        print(
            f"\n\033[1m$ {shown}{command}\033[0m" if sys.stdout.isatty() else f"\n$ {shown}{command}",
            flush=True,
        )
        began = time.monotonic()
        process = subprocess.Popen(
            shlex.split(command),
            cwd=self.folder,
            env=self.environment | extra,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = process.wait()
        self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - began
        if code != 0:
            print(f"\nthe demo ends here: `{command}` failed with exit code {code}", file=sys.stderr)
            sys.exit(code)
        return "".join(lines)

    def skip(self, step: str, what: str) -> None:
        """Say that a step's result is there already."""
        self.reused.append(step)
        print(f"\n({step}: {what} is there already)", flush=True)

    def base_option(self) -> str:
        """How later commands name a base that is a folder; one of the Hub is named by the release itself."""
        return "" if self.base else f" --base {BASE}"


def main() -> None:
    """Go the whole way, then say what was made."""
    parser = argparse.ArgumentParser(description="Plan, train, evaluate, sign, push, pull, load and merge.")
    parser.add_argument("--base", metavar="OWNER/NAME", help="a base of the Hub instead of the embedded one")
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / "demo")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(folder, arguments.base or None)
    began = time.monotonic()
    make_release(demo)
    with serving(demo) as endpoint:
        publish_and_use(demo, endpoint)
    merge(demo)
    report(demo, time.monotonic() - began, arguments.record)


def make_release(demo: Demo) -> None:
    """Data, base, plan, train, eval, card, keys, signature."""
    examples = os.path.relpath(HERE, demo.folder)
    demo.run("data", f"python {examples}/generate.py data")
    shutil.copyfile(HERE / "recipe.yaml", demo.folder / "recipe.yaml")
    settings = ""
    if demo.base is None:
        demo.run("fetch base", f"python {examples}/fetch_base.py {BASE}")
    else:
        settings = f" --set base={demo.base} --set base_name=null"
    demo.run("plan", f"adapterhub plan recipe.yaml{settings}")
    release = demo.folder / RELEASE
    if (release / "adapterhub.json").is_file():
        check_recipe(demo, release)
        demo.skip("train", RELEASE)
    else:
        resume = " --resume" if (demo.folder / f"{RELEASE}.run").is_dir() else ""
        demo.run("train", f"adapterhub train recipe.yaml --out {RELEASE}{settings}{resume}")
    if (release / "model.sig").is_file():
        for step in ("eval", "card", "keygen", "sign"):
            demo.skip(step, f"{RELEASE}, signed")
        return
    command = f"adapterhub eval {RELEASE} --data data/test.jsonl --batch-size 60{demo.base_option()}"
    demo.run("eval", command)
    demo.run("card", f"adapterhub card {RELEASE}")
    if (demo.folder / "keys").is_dir():
        demo.skip("keygen", "keys")
    else:
        demo.run("keygen", "adapterhub keygen keys")
    demo.run("sign", f"adapterhub sign {RELEASE} --key keys/adapterhub.key")


def check_recipe(demo: Demo, release: Path) -> None:
    """End the demo when the release there was made by another recipe."""
    from adapterhub import Recipe

    overrides = [f"base={demo.base}", "base_name=null"] if demo.base else []
    wanted = Recipe.read(demo.folder / "recipe.yaml", overrides).public_dict()
    if json.loads((release / "adapterhub.json").read_bytes())["recipe"] != wanted:
        fail(f"{release} was made by another recipe; to begin again: rm -r {demo.folder}")


@contextmanager
def serving(demo: Demo) -> Iterator[str]:
    """An embedded Hub in the background; yields its address."""
    token = secrets.token_hex(16)
    command = "adapterhub hub serve hub --port 0 --user demo"
    print(f"\n$ ADAPTERHUB_HUB_TOKEN=… {command} &", flush=True)
    environment = demo.environment | {"ADAPTERHUB_HUB_TOKEN": token}
    process = subprocess.Popen(
        shlex.split(command), cwd=demo.folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        if not first.startswith("listening on "):
            fail(f"`{command}` did not start")
        print(first, flush=True)
        demo.environment["HF_TOKEN"] = token
        yield first.removeprefix("listening on ")
    finally:
        process.terminate()
        process.wait(timeout=30)


def publish_and_use(demo: Demo, endpoint: str) -> None:
    """Push; then, as somebody with an empty cache who trusts one key: pull, and ask the adapter."""
    demo.run("push", f"adapterhub push {RELEASE} {REPO} --endpoint {endpoint}")
    cache = demo.folder / "reader-cache"
    shutil.rmtree(cache, ignore_errors=True)
    reader = {"HF_HOME": "reader-cache", "XDG_CONFIG_HOME": "reader-config"}
    version = json.loads((demo.folder / RELEASE / "adapterhub.json").read_bytes())["version"]
    pull = (
        f"adapterhub pull {REPO}@v{version} --endpoint {endpoint} --require-signed --key keys/adapterhub.pub"
    )
    pulled = demo.run("pull", pull, **reader).splitlines()[-1]
    script = f"python {os.path.relpath(HERE, demo.folder)}/infer.py"
    if demo.base is None:
        demo.run("load and answer", f"{script} {REPO}@v{version} {BASE}", HF_ENDPOINT=endpoint, **reader)
    else:  # the base comes from the user's own Hub, the adapter from what was pulled
        demo.run("load and answer", f"{script} {pulled}")


def merge(demo: Demo) -> None:
    """A checkpoint that needs no adapter."""
    if (demo.folder / MERGED).is_dir():
        demo.skip("merge", MERGED)
    else:
        demo.run(
            "merge", f"adapterhub merge {RELEASE} --to bf16 --onto trained --out {MERGED}{demo.base_option()}"
        )


def report(demo: Demo, seconds: float, record: Path | None) -> None:
    """The table at the end: what was made, where, its digest and scores, and how to open the card."""
    from rich.console import Console
    from rich.table import Table

    from adapterhub import Release

    release = Release.open(demo.folder / RELEASE)
    scores = json.loads((release.path / "evidence/scores.json").read_bytes())["scores"]
    curve = json.loads((release.path / "evidence/curve.json").read_bytes())
    by_metric = {score["metric"]: score for score in scores}
    table = Table(title="What was made", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("release", f"{release.manifest.name} {release.manifest.version} in {release.path}")
    table.add_row("digest", release.digest)
    exact, loss = by_metric["exact_match"], by_metric["loss"]
    table.add_row(
        "exact match",
        f"base {exact['base']:.1%}, adapter {exact['adapter']:.1%} of {exact['rows']} orders",
    )
    table.add_row("held-out loss", f"base {loss['base']:.3f}, adapter {loss['adapter']:.3f} nats a token")
    table.add_row("training", f"{curve['steps']} steps, {curve['tokens_per_second']:.0f} tokens/s")
    table.add_row("on the Hub", f"{REPO}@v{release.manifest.version} (served from {demo.folder / 'hub'})")
    table.add_row("merged", str(demo.folder / MERGED))
    table.add_row("open the card", f"file://{release.path / 'card.html'}")
    times = ", ".join(f"{step} {took:.0f} s" for step, took in demo.seconds.items())
    table.add_row("time", f"{seconds:.0f} s: {times}")
    console = Console()
    console.print()
    console.print(table)
    if record:
        write_record(record, demo, release.digest, seconds, curve, by_metric)
    if demo.base is None and not (exact["base"] <= MOST_FOR_BASE and exact["adapter"] >= LEAST_FOR_ADAPTER):
        fail(
            f"exact match should be at most {MOST_FOR_BASE:.0%} for the base and "
            f"at least {LEAST_FOR_ADAPTER:.0%} with the adapter"
        )


def write_record(
    path: Path, demo: Demo, digest: str, seconds: float, curve: dict, by_metric: dict[str, dict]
) -> None:
    """The figures as JSON, with the machine and the versions they were measured with."""
    manifest = json.loads((demo.folder / RELEASE / "adapterhub.json").read_bytes())
    content = {
        "what": "make demo: wall time by step in seconds, exact match and loss before and after training",
        "hardware": manifest["hardware"],
        "python": platform.python_version(),
        "tools": manifest["tools"],
        "release_digest": digest,
        "seconds": {step: round(took, 1) for step, took in demo.seconds.items()},
        "seconds_in_all": round(seconds, 1),
        "reused": demo.reused,
        "training_tokens_per_second": curve["tokens_per_second"],
        "training_tokens": curve["train_tokens"],
        "scores": by_metric,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def fail(why: str) -> NoReturn:
    """End the demo with an error."""
    print(f"\nthe demo failed: {why}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
