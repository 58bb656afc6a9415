"""What the 300 built-in probes cost on a CPU, both sides, beside transformers' own text-generation pipeline.

Takes a release and its base's folder; the probes are written into the release, as `adapterhub eval` does::

    python benchmarks/probes.py RELEASE BASE [--out benchmarks/results/probes.json]

CPU seconds are user and system time of all threads. The pipeline answers every tenth probe with the base in
the same batch size and the file's order, as a script would; the ratio is ours over its.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe_machine

BATCH = 64
EVERY = 10
TARGET_CPU_SECONDS = 240
"""Of one model's answers to 300 probes."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("release", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probes.json")
    options = parser.parse_args()
    machine = describe_machine("adapterhub", "bitsandbytes", "peft", "torch", "transformers")
    whole = ask_all(options.release, options.base)
    peer = beside_pipeline(options.base)
    result = {
        "what": __doc__.splitlines()[0],
        **machine,
        "model": options.base.name,
        "batch_size": BATCH,
        "target_cpu_seconds_a_side": TARGET_CPU_SECONDS,
        "eval_probes_all": whole,
        "same_probes_by_the_base": peer,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({"eval_probes_all": whole, "same_probes_by_the_base": peer}, indent=2))
    return 0 if whole["cpu_seconds_a_side"] <= TARGET_CPU_SECONDS else 1


def ask_all(release: Path, base: Path) -> dict[str, Any]:
    """The command itself, loading included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "adapterhub",
        "eval",
        str(release),
        "--base",
        str(base),
        "--probes",
        "all",
    ]
    command += ["--batch-size", str(BATCH), "--json"]
    document = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "probes": sum(score["probes"] for score in document["probes"]["scores"]),
        "cpu_seconds": round(spent, 1),
        "cpu_seconds_a_side": round(spent / 2, 1),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "wall_seconds_answering": document["probes"]["seconds"],
        "scores": {
            f"{score['probe_class']}{', ' + score['tier'] if score['tier'] else ''}": {
                key: score[key]
                for key in ("probes", "base_passed", "adapter_passed", "p_adjusted", "verdict")
            }
            for score in document["probes"]["scores"]
        },
    }


def beside_pipeline(folder: Path) -> dict[str, Any]:
    """CPU seconds of both ways to ask the base, in bf16, every tenth probe with 64 tokens at most."""
    import torch
    from transformers import pipeline

    from adapterhub.cards.generation import Decoding, generate_answers
    from adapterhub.cards.probes import BUILT_IN, generate_suite
    from adapterhub.cards.questions import pose_prompt
    from adapterhub.trainer.model import load_base, load_tokenizer

    probes = [p for p in generate_suite(list(BUILT_IN)).probes[::EVERY] if p.max_new_tokens <= 64]
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    model = load_base(folder, None, "cpu")
    prompts = [pose_prompt(tokenizer, probe.messages, probe.where) for probe in probes]
    decoding = Decoding(64, BATCH, (tokenizer.eos_token_id,), model.config.max_position_embeddings)
    ours = cpu_seconds(lambda: generate_answers(model, tokenizer, prompts, decoding, lambda *_: None))
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, dtype=torch.bfloat16)
    asked = [list(probe.messages) for probe in probes]
    theirs = cpu_seconds(
        lambda: generate(asked, max_new_tokens=64, do_sample=False, batch_size=BATCH, return_full_text=False)
    )
    return {
        "probes": len(probes),
        "adapterhub_cpu_seconds": round(ours, 1),
        "transformers_pipeline_cpu_seconds": round(theirs, 1),
        "ratio": round(ours / theirs, 3),
    }


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    sys.exit(main())
