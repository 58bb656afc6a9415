"""What the 300 built-in probes cost on a CPU, both sides, beside transformers' own text-generation pipeline.

Takes a release and its base's folder, and writes nothing into either::

    python benchmarks/probes.py RELEASE BASE [--out benchmarks/results/probes.json]

CPU seconds are user and system time of all threads. The pipeline answers every tenth probe with the base in
the same batch size and the file's order, as a script would; the ratio is ours over its.
"""

from __future__ import annotations

import argparse
import json
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
    return 0 if max(whole["base_cpu_seconds"], whole["adapter_cpu_seconds"]) <= TARGET_CPU_SECONDS else 1


def ask_all(release: Path, base: Path) -> dict[str, Any]:
    """Base and adapter, as `adapterhub eval --probes all` asks them; CPU seconds of loading and of each."""
    from adapterhub.cards.probes import BUILT_IN, generate_suite
    from adapterhub.cards.probing import Subject, pose_probes, probe_both
    from adapterhub.commands import measuring
    from adapterhub.packaging.release import Release
    from adapterhub.trainer.hardware import detect_hardware

    started = time.process_time()
    loaded = measuring.load(Release.open(release), measuring.Base(base))
    posed = pose_probes(loaded.tokenizer, [generate_suite(list(BUILT_IN))], loaded.context)
    marks: dict[str, list[float]] = {}

    def mark(stage: str, _done: int, _total: int) -> None:
        marks.setdefault(stage.partition(":")[0], []).append(time.process_time())

    subject = Subject(loaded.adapter_sha256, measuring.tools(), detect_hardware())
    asked = time.process_time()
    evidence = probe_both(loaded.model, loaded.tokenizer, posed, loaded.decoding(BATCH, 128), subject, mark)
    sides = {side: round(times[-1] - times[0], 1) for side, times in marks.items()}
    return {
        "probes": len(posed.probes),
        "loading_cpu_seconds": round(asked - started, 1),
        "base_cpu_seconds": sides["base"],
        "adapter_cpu_seconds": sides["adapter"],
        "both_cpu_seconds": round(sum(sides.values()), 1),
        "wall_seconds_answering": evidence.seconds,
        "scores": {
            f"{score.probe_class}{', ' + score.tier if score.tier else ''}": {
                key: getattr(score, key)
                for key in ("probes", "base_passed", "adapter_passed", "p_adjusted", "verdict")
            }
            for score in evidence.scores
        },
    }


def beside_pipeline(folder: Path) -> dict[str, Any]:
    """CPU seconds of both ways to ask the base, every tenth probe with 64 tokens at most."""
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
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
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
