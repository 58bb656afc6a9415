"""What each way of merging a QLoRA adapter loses: KL to the live model, agreement, likelihood.

The live model is the NF4 base (double quantization, blocks of 64) with the adapter attached. Every model's
weights are dequantized and computed with in float32, so that figures differ by weights alone and not by a
machine's arithmetic. Adapters of rank 16 and 64 are trained here by ``adapterhub train``, 120 steps of one
row of 512 tokens; ``--adapter`` measures a release instead::

    python benchmarks/merge_fidelity.py --base SMOLLM2-135M-INSTRUCT --train TRAIN.jsonl --test TEST.jsonl

Models are measured on the first 60 rows of TEST, codes chosen on rows from all over TRAIN. A case that the
results file has for the same adapter is not measured again, so a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from adapterhub.load import default_device
from adapterhub.packaging.adapter import read_adapter
from adapterhub.packaging.calibration.calibrate import CalibrationText
from adapterhub.packaging.checkpoint import open_checkpoint
from adapterhub.packaging.files import sha256_file
from adapterhub.packaging.manifest import Quantization
from adapterhub.packaging.merge import merge_adapter
from adapterhub.packaging.sums import plan_sums
from adapterhub.packaging.survival import weights_in
from adapterhub.trainer.model import load_tokenizer
from adapterhub.trainer.texts import CALIBRATED, read_texts, sample_texts

RECIPE = """
name: sft-rank-{rank}
base: {base}
base_name: HuggingFaceTB/SmolLM2-135M-Instruct
data: {{train: {train}, licence: mit, max_length: 512, packing: true}}
quantization: {{type: nf4, double: true}}
lora: {{rank: {rank}, alpha: {alpha}, target_modules: all-linear}}
training: {{steps: 120, batch_size: 1, learning_rate: 5.0e-4, warmup: 0.05, save_every: 1000}}
"""
RANKS = (16, 64)
ROWS = 60
Weights = Callable[[str], torch.Tensor]
"""From a linear layer's name to its weight, float32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument(
        "--adapter", type=Path, action="append", help="A release to measure; none is trained."
    )
    parser.add_argument("--only", action="append", help="Only these cases.")
    parser.add_argument("--texts", type=int, default=CALIBRATED, help="Texts to choose codes on.")
    parser.add_argument("--jobs", type=int, default=1, help="Cases at a time, each in its own process.")
    parser.add_argument("--folder", type=Path, help="Where trained adapters stay. Default: nowhere.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_fidelity.json")
    given = parser.parse_args()
    results = json.loads(given.out.read_text()) if given.out.is_file() else {"adapters": {}}
    with tempfile.TemporaryDirectory() as scratch:
        adapters = given.adapter or train_adapters(given.base, given.train, given.folder or Path(scratch))
        todo = []
        for adapter in adapters:
            digest = sha256_file(adapter / "adapter_model.safetensors")
            found = results["adapters"].setdefault(adapter.name, {})
            if found.get("weights_sha256") != digest:
                found.clear()
                found |= {"weights_sha256": digest, "machine": _machine(), "cases": {}}
            wanted = [name for name in CASES if not given.only or name in given.only]
            todo += [(adapter, name) for name in wanted if name not in found["cases"]]
        with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
            started = {
                pool.submit(measure_case, given.base, adapter, given.train, given.test, given.texts, name): (
                    adapter,
                    name,
                )
                for adapter, name in todo
            }
            for future in as_completed(started):
                adapter, name = started[future]
                case = future.result()
                results["adapters"][adapter.name]["cases"][name] = case
                print(f"{adapter.name:<16} {name:<28} {json.dumps(case)}", flush=True)
                _write(given.out, results)


def _machine() -> dict[str, object]:
    device = torch.cuda.get_device_name() if default_device() == "cuda" else "cpu"
    return {"device": device, **describe_machine("torch", "transformers", "bitsandbytes", "peft")}


def _write(path: Path, results: dict[str, Any]) -> None:
    head = {
        "what": "models merged from a QLoRA adapter, beside the live one: KL in nats a token, top-1 "
        "agreement, NLL in nats a token; weights dequantized, float32 arithmetic",
    }
    path.write_text(json.dumps({**results, **head}, indent=2) + "\n")


def measure_case(base: Path, adapter: Path, train: Path, test: Path, texts: int, name: str) -> dict[str, Any]:
    """One case's figures."""
    began = time.perf_counter()
    case = CASES[name](_bench(base, adapter, train, test, texts))
    return {**case, "seconds": round(time.perf_counter() - began, 1)}


@lru_cache(maxsize=1)
def _bench(base: Path, adapter: Path, train: Path, test: Path, texts: int) -> Bench:
    """A process keeps the live model's answers for its next case."""
    return Bench(base, adapter, train, test, texts)


class Bench:
    """One adapter, and what it is measured on."""

    def __init__(self, base: Path, adapter: Path, train: Path, test: Path, texts: int) -> None:
        self._base, self._adapter, self._train, self._calibrated = base, adapter, train, texts
        self._device = default_device()
        self._tokenizer = load_tokenizer(base)
        self._texts = read_texts(test, self._tokenizer, limit=ROWS)
        self._live: list[torch.Tensor] | None = None

    def live(self) -> dict[str, Any]:
        return self._report(self._expected())

    def base_in_16_bits(self) -> dict[str, Any]:
        return self._measure(None)

    def base_in_nf4(self) -> dict[str, Any]:
        return self._measure(self._sums(adapted=False, trained=True))

    def _expected(self) -> list[torch.Tensor]:
        """The live model's log-probabilities, a text each, float16."""
        if self._live is None:
            self._live = self._answers(self._sums(adapted=True, trained=True))
        return self._live

    def _sums(self, *, adapted: bool, trained: bool) -> Weights:
        checkpoint = open_checkpoint(self._base)
        adapter = read_adapter(self._adapter) if adapted else None
        through = Quantization() if trained else None
        plan = plan_sums(adapter, checkpoint, through, device=self._device)
        sums = {name: compute for shard in checkpoint.shards for name, compute in plan.sums_of(shard)}
        return lambda module: sums[f"{module}.weight"]()

    def merged(self, onto: Any, storage: Any, chosen: bool = False) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM

        calibration = None
        if chosen:
            texts = sample_texts(self._train, self._tokenizer, self._calibrated)
            calibration = CalibrationText(self._train.name, sha256_file(self._train), texts)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "out"
            report = merge_adapter(
                self._adapter,
                self._base,
                out,
                onto=onto,
                storage=storage,
                calibration=calibration,
                device=self._device,
            )
            seconds = time.perf_counter() - began
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
            figures = self._measure(weights_in(model))
        figures["seconds_to_merge"] = round(seconds, 1)
        if report.rounding is not None:
            weights = report.rounding.weights
            figures["calibration_texts"] = report.rounding.texts
            figures["calibration_tokens"] = report.rounding.tokens
            figures["output_error_beside_nearest"] = round(
                sum(error.chosen for error in weights) / sum(error.nearest for error in weights), 4
            )
            figures["kept_nearest"] = sum(error.chosen >= error.nearest for error in weights)
        return figures

    def peft(self) -> dict[str, Any]:
        import warnings

        from peft import PeftModel

        from adapterhub.trainer.model import load_base

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(
                load_base(self._base, Quantization(), self._device), str(self._adapter)
            ).merge_and_unload()
        return self._measure(weights_in(model))

    def _measure(self, weights: Weights | None) -> dict[str, Any]:
        return self._report(self._answers(weights))

    def _answers(self, weights: Weights | None) -> list[torch.Tensor]:
        """Log-probabilities of a model with these weights in its linear layers; None: the base's own."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32).eval().to(self._device)
        with torch.inference_mode():
            if weights is not None:
                for name, module in model.named_modules():
                    if isinstance(module, torch.nn.Linear) and ".layers." in name:
                        module.weight.copy_(weights(name))
            return [
                model(input_ids=torch.tensor([ids], device=self._device))
                .logits[0, :-1]
                .log_softmax(dim=-1)
                .half()
                .cpu()
                for ids in self._texts
            ]

    def _report(self, answers: list[torch.Tensor]) -> dict[str, Any]:
        kl = nats = 0.0
        agreeing = tokens = 0
        for expected, found, ids in zip(self._expected(), answers, self._texts, strict=True):
            p, q = expected.float(), found.float()
            kl += float((p.exp() * (p - q)).sum())
            agreeing += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
            nats -= float(q.gather(1, torch.tensor(ids[1:])[:, None]).sum())
            tokens += len(ids) - 1
        return {
            "kl": round(kl / tokens, 4),
            "top1_agreement": round(agreeing / tokens, 4),
            "nll": round(nats / tokens, 4),
            "perplexity": round(math.exp(nats / tokens), 3),
            "tokens": tokens,
        }


CASES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "onto trained, NF4 calibrated": lambda bench: bench.merged("trained", "nf4", chosen=True),
    "onto original, NF4 calibrated": lambda bench: bench.merged("original", "nf4", chosen=True),
    "live": Bench.live,
    "base in 16 bits": Bench.base_in_16_bits,
    "base in NF4": Bench.base_in_nf4,
    "onto trained, bf16": lambda bench: bench.merged("trained", "bf16"),
    "onto original, bf16": lambda bench: bench.merged("original", "bf16"),
    "PEFT merge_and_unload, NF4": Bench.peft,
    "onto trained, NF4 nearest": lambda bench: bench.merged("trained", "nf4"),
    "onto original, NF4 nearest": lambda bench: bench.merged("original", "nf4"),
    "onto trained, int8": lambda bench: bench.merged("trained", "int8"),
    "onto original, int8": lambda bench: bench.merged("original", "int8"),
    "onto trained, FP4 nearest": lambda bench: bench.merged("trained", "fp4"),
    "onto original, FP4 nearest": lambda bench: bench.merged("original", "fp4"),
    "onto trained, FP4 calibrated": lambda bench: bench.merged("trained", "fp4", chosen=True),
    "onto original, FP4 calibrated": lambda bench: bench.merged("original", "fp4", chosen=True),
}
"""The longest first, so that they do not end last where several run at a time."""


def train_adapters(base: Path, data: Path, folder: Path) -> list[Path]:
    """The releases of rank 16 and 64 in ``folder``, trained at the same time; taken if they are there."""
    running, adapters = [], []
    for rank in RANKS:
        out = folder / f"sft-rank-{rank}"
        adapters.append(out)
        if out.is_dir():
            continue
        recipe = folder / f"sft-rank-{rank}.yaml"
        recipe.write_text(RECIPE.format(rank=rank, alpha=2 * rank, base=base.resolve(), train=data.resolve()))
        command = [sys.executable, "-m", "adapterhub", "train", str(recipe), "--out", str(out)]
        running.append(subprocess.Popen(command, stdout=sys.stderr))
    failed = [process.args for process in running if process.wait() != 0]
    if failed:
        raise SystemExit(f"{failed[0]} failed")
    return adapters


if __name__ == "__main__":
    main()
