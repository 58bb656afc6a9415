"""Streaming merge beside PEFT's load-merge-save and beside a plain copy: wall time and peak memory.

A LLaMA of 1.2 B random bfloat16 parameters in 1 GB shards, and one twice as deep; an adapter of rank 16 on
every linear layer. Run it on an idle machine::

    python benchmarks/merge_speed.py [--folder TMP] [--out benchmarks/results/merge_speed.json]

Times are wall times of whole processes, imports included, sources in the page cache; memory is the kernel's
ru_maxrss of each process. A merge is on the disk when it ends, a plain copy and PEFT's checkpoint are not:
what the disk takes for them stands beside (``synced``). Merges onto trained weights, or to NF4 of the
original, have no counterpart in PEFT (it merges into the 4-bit base that is loaded) and are listed for
themselves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from machine import describe_machine

Result = TypeVar("Result")

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS, RANK = 2048, 8192, 32000, 16, 16
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}

_SYNC = 'sync "$1"/*'
_NO_COUNTERPART = ("to NF4", "onto trained")

MAKE_BASE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(hidden_size={hidden}, intermediate_size={intermediate}, num_hidden_layers={layers},
    num_attention_heads=32, num_key_value_heads=32, vocab_size={vocabulary}, dtype=torch.bfloat16)
torch.set_default_dtype(torch.bfloat16)
LlamaForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="1GB")
"""

PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")
"""


@dataclass(frozen=True)
class Run:
    """One process."""

    seconds: float
    """Wall time, start to end."""
    peak_rss_bytes: int
    """Largest resident set, of the process itself."""


def measure(command: Sequence[str]) -> Run:
    started = time.perf_counter()
    process = os.posix_spawn(command[0], list(command), os.environ)
    _pid, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - started
    if status != 0:
        raise SystemExit(f"{' '.join(command[:4])} … failed with status {status}")
    return Run(round(seconds, 2), usage.ru_maxrss * 1024)


def make_base(folder: Path, layers: int) -> Path:
    base = folder / f"base-{layers}"
    script = MAKE_BASE.format(hidden=HIDDEN, intermediate=INTERMEDIATE, layers=layers, vocabulary=VOCABULARY)
    measure([sys.executable, "-c", script, str(base)])
    return base


def make_adapter(folder: Path, layers: int) -> Path:
    """A PEFT adapter with random factors, B too."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    adapter = folder / f"adapter-{layers}"
    names = sorted({module.split(".")[1] for module in MODULES})
    LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM", inference_mode=True
    ).save_pretrained(adapter)
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for layer in range(layers):
        for module, (rows, columns) in MODULES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            factors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            factors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.02
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    return adapter


def make_release(folder: Path, adapter: Path, base: Path) -> Path:
    """The adapter as a release that binds its base."""
    from datetime import UTC, datetime

    from adapterhub.packaging.base import lock_base
    from adapterhub.packaging.manifest import Manifest, Quantization
    from adapterhub.packaging.release import new_release

    release = folder / f"release-{base.name}"
    draft = Manifest(
        name="merge-speed",
        version="0.1.0",
        created=datetime.now(UTC),
        base=lock_base(base, name=base.name, quantization=Quantization()),
    )
    with new_release(release, draft) as staging:
        shutil.copytree(adapter, staging, dirs_exist_ok=True)
    return release


def count_differing(ours: Path, theirs: Path) -> dict[str, int]:
    """Tensors that two checkpoints do not share bit for bit."""
    import torch
    from safetensors.torch import load_file

    files = sorted(path.name for path in theirs.glob("*.safetensors"))
    theirs_by_name = {name: tensor for file in files for name, tensor in load_file(theirs / file).items()}
    differing = total = 0
    for path in sorted(ours.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            total += 1
            differing += not torch.equal(tensor, theirs_by_name.pop(name))
    return {"tensors": total, "differing": differing, "missing": len(theirs_by_name)}


def in_a_child(function: Callable[..., Result], *args: object) -> Result:
    """Run in a fresh process: a child starts with its parent's ru_maxrss, so this process must stay small."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def run_all(folder: Path, layers: int, repeats: int) -> dict[str, object]:
    """Every way to merge at one depth; ours and the copy ``repeats`` times."""
    base, adapter = make_base(folder, layers), in_a_child(make_adapter, folder, layers)
    release = in_a_child(make_release, folder, adapter, base)
    out = folder / "out"
    merge = [sys.executable, "-m", "adapterhub", "merge", "--base", str(base), "--out", str(out)]
    original, nf4 = ["--onto", "original", "--to"], ["nf4", "--rounding", "nearest"]
    commands = {
        "copy": ["/bin/cp", "-r", str(base), str(out)],
        "copy, synced": ["/bin/sh", "-c", f'cp -r "$0" "$1" && {_SYNC}', str(base), str(out)],
        "adapterhub, plain adapter": [*merge, *original, "bf16", str(adapter)],
        "adapterhub, release": [*merge, *original, "bf16", str(release)],
        "adapterhub, release, to NF4": [*merge, *original, *nf4, str(release)],
        "adapterhub, release, onto trained": [*merge, "--onto", "trained", "--to", "bf16", str(release)],
    }
    runs: dict[str, object] = {}
    for name, command in commands.items():
        found = []
        for _ in range(1 if name.endswith(_NO_COUNTERPART) else repeats):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            found.append(measure(command))
        runs[name] = [asdict(run) for run in found]
        print(f"{layers} layers, {name}: {min(r.seconds for r in found)} s", file=sys.stderr)
    shutil.rmtree(out)
    measure(commands["adapterhub, plain adapter"])
    theirs = folder / "peft"
    os.sync()
    peft = measure([sys.executable, "-c", PEFT_MERGE, str(base), str(adapter), str(theirs)])
    synced = measure(["/bin/sh", "-c", _SYNC, "", str(theirs)])
    runs["peft"] = [asdict(peft)]
    runs["peft, synced"] = [asdict(replace(peft, seconds=round(peft.seconds + synced.seconds, 2)))]
    print(f"{layers} layers, peft: {peft.seconds} s, synced {synced.seconds} s later", file=sys.stderr)
    same = in_a_child(count_differing, out, theirs)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    for path in (base, out, theirs):
        shutil.rmtree(path)
    return {"layers": layers, "bytes": size, "runs": runs, "against_peft": same}


def summarize(depth: dict) -> dict[str, object]:
    best = {name: min(run["seconds"] for run in runs) for name, runs in depth["runs"].items()}
    peak = {name: max(run["peak_rss_bytes"] for run in runs) for name, runs in depth["runs"].items()}
    ours = {name: seconds for name, seconds in best.items() if name.startswith("adapterhub")}
    alike = {name: seconds for name, seconds in ours.items() if not name.endswith(_NO_COUNTERPART)}
    return {
        "best_seconds": best,
        "peak_rss_bytes": peak,
        "times_faster_than_peft": {name: round(best["peft"] / seconds, 2) for name, seconds in alike.items()},
        "times_faster_than_peft_synced": {
            name: round(best["peft, synced"] / seconds, 2) for name, seconds in alike.items()
        },
        "times_slower_than_copy_synced": {
            name: round(seconds / best["copy, synced"], 2) for name, seconds in ours.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to put some 20 GB for a while")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_speed.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="+", default=[LAYERS, 2 * LAYERS])
    options = parser.parse_args()
    machine = describe_machine("adapterhub", "torch", "peft", "transformers", "bitsandbytes")
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        depths = [run_all(Path(folder), layers, options.repeats) for layers in options.depths]
    result = {
        "what": __doc__.splitlines()[0],
        **machine,
        "depths": [depth | {"summary": summarize(depth)} for depth in depths],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps([depth["summary"] for depth in result["depths"]], indent=2))


if __name__ == "__main__":
    main()
