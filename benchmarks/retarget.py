"""An adapter on other versions of its base, as it was and re-fitted: KL to it on the base trained on.

``adapterhub retarget`` to each number format, on equal texts; as it was is what PEFT gives to whoever loads
the adapter on that base. Needs a release and its base (by default those of ``make demo``)::

    python benchmarks/retarget.py [--release DIR] [--base DIR] [--text FILE] [--limit 96] [--to fp4 int8 bf16]

KL, agreement and perplexity are of the texts that nothing was fitted on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe_machine

from adapterhub.packaging.files import sha256_file

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
FORMATS = ("fp4", "int8", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", type=Path, default=DEMO / "smollm2-orders")
    parser.add_argument("--base", type=Path, default=DEMO / "smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=DEMO / "data" / "train.jsonl")
    parser.add_argument("--limit", type=int, default=96, help="texts; every fourth is measured on")
    parser.add_argument("--to", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retarget.json")
    options = parser.parse_args()
    result = {
        "what": __doc__.splitlines()[0],
        **describe_machine("adapterhub", "torch", "transformers", "bitsandbytes"),
        "release": options.release.name,
        "weights_sha256": sha256_file(options.release / "adapter_model.safetensors"),
        "text": options.text.name,
        "formats": {},
    }
    for kind in options.to:
        result["formats"][kind] = refit(options, kind)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        print(kind, json.dumps(result["formats"][kind]))


def refit(options: argparse.Namespace, kind: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as scratch:
        named = {"--base": options.base, "--text": options.text, "--limit": options.limit, "--to": kind}
        arguments = [options.release, "--out", Path(scratch) / "out", "--json"]
        arguments += [part for pair in named.items() for part in pair]
        command = [sys.executable, "-m", "adapterhub", "retarget", *map(str, arguments)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    evidence = json.loads(done.stdout)
    return {
        "texts": {"fitted_on": evidence["calibrated"], "measured_on": evidence["measured"]},
        "as_it_was": figures(evidence["as_it_was"]),
        "refitted": figures(evidence["refitted"]),
        "kl_refitted_to_as_it_was": round(
            evidence["refitted"]["kl_mean"] / evidence["as_it_was"]["kl_mean"], 3
        ),
        "kept": evidence["kept"],
        "mean_layer_error": {
            when: round(statistics.mean(layer[f"error_{when}"] for layer in evidence["layers"]), 4)
            for when in ("before", "after")
        },
        "seconds": evidence["seconds"],
    }


def figures(measured: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in measured.items() if name != "layers"}


if __name__ == "__main__":
    main()
