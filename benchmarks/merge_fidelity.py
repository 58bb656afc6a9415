"""What each way of merging a QLoRA adapter loses: KL to the live model, agreement, likelihood.

The live model is the NF4 base (double quantization, blocks of 64) with the adapter attached. Every model's
weights are dequantized and computed with in float32, so that figures differ by weights alone and not by a
machine's arithmetic. Adapters are trained here, in float32 on the dequantized weights (what QLoRA computes,
without the rounding to bf16), 120 steps of one conversation; ``--adapter`` measures a release as well::

    python benchmarks/merge_fidelity.py --base SMOLLM2-135M-INSTRUCT --train TRAIN.jsonl --test TEST.jsonl

Models are measured on the first 60 rows of TEST, codes chosen on 128 rows from all over TRAIN. A case that
the results file has for the same adapter is not measured again, so a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from adapterhub.packaging.adapter import read_adapter
from adapterhub.packaging.calibration.calibrate import CalibrationText
from adapterhub.packaging.checkpoint import open_checkpoint
from adapterhub.packaging.files import sha256_file
from adapterhub.packaging.manifest import Quantization
from adapterhub.packaging.merge import merge_adapter
from adapterhub.packaging.quantized import through_4bit_
from adapterhub.packaging.sums import plan_sums
from adapterhub.packaging.survival import weights_in
from adapterhub.trainer.data import read_rows
from adapterhub.trainer.model import load_tokenizer
from adapterhub.trainer.template import IGNORED, encode
from adapterhub.trainer.texts import read_texts, sample_texts

STEPS, LEARNING_RATE, LONGEST = 120, 5e-4, 256
WARMUP, CLIP = 6, 0.3
ROWS = 60
MATRIX = 4096
"""Side of the weight that quantizing is timed on."""
Weights = Callable[[str], torch.Tensor]
"""From a linear layer's name to its weight, float32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--rank", type=int, action="append", help="Of an adapter to train. Default: 16, 64.")
    parser.add_argument("--adapter", type=Path, action="append", default=[], help="A release to measure too.")
    parser.add_argument("--only", action="append", help="Only these cases.")
    parser.add_argument("--folder", type=Path, help="Where trained adapters stay. Default: nowhere.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_fidelity.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"adapters": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        adapters = list(arguments.adapter)
        for rank in arguments.rank if arguments.rank is not None else (16, 64):
            adapters.append(train_adapter(arguments.base, arguments.train, rank, folder))
        for adapter in adapters:
            bench = Bench(arguments.base, adapter, arguments.train, arguments.test, Path(scratch))
            found = results["adapters"].setdefault(adapter.name, {})
            if found.get("weights_sha256") != bench.digest:
                found.clear()
                found["weights_sha256"] = bench.digest
                found["cases"] = {}
            for name, measure in bench.cases():
                if name in found["cases"] or (arguments.only and name not in arguments.only):
                    continue
                began = time.perf_counter()
                case = measure()
                found["cases"][name] = {**case, "seconds": round(time.perf_counter() - began, 1)}
                print(f"{adapter.name:<16} {name:<28} {json.dumps(found['cases'][name])}", flush=True)
                _write(arguments.out, results)
    if not arguments.only or "quantize speed" in arguments.only:
        results["quantizing"] = quantizing_speed()
        print(json.dumps(results["quantizing"]))
    _write(arguments.out, results)


def _write(path: Path, results: dict[str, Any]) -> None:
    head = {
        "what": "models merged from a QLoRA adapter, beside the live one: KL in nats a token, top-1 "
        "agreement, NLL in nats a token; weights dequantized, float32 arithmetic",
        **describe_machine("torch", "transformers", "bitsandbytes", "peft"),
    }
    path.write_text(json.dumps({**results, **head}, indent=2) + "\n")


class Bench:
    """One adapter's cases."""

    def __init__(self, base: Path, adapter: Path, train: Path, test: Path, scratch: Path) -> None:
        self._base, self._adapter, self._train, self._scratch = base, adapter, train, scratch
        self._tokenizer = load_tokenizer(base)
        self._texts = read_texts(test, self._tokenizer, limit=ROWS)
        self._live: list[torch.Tensor] | None = None
        self.digest = sha256_file(adapter / "adapter_model.safetensors")

    def cases(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Every case's name and what measures it."""
        yield "live", lambda: self._report(self._expected())
        yield "base in 16 bits", lambda: self._measure(None)
        yield "base in NF4", lambda: self._measure(self._sums(adapted=False, trained=True))
        for onto in ("trained", "original"):
            yield f"onto {onto}, bf16", lambda onto=onto: self._merged(onto, "bf16")
        yield "PEFT merge_and_unload, NF4", self._peft
        for onto in ("trained", "original"):
            yield f"onto {onto}, NF4 nearest", lambda onto=onto: self._merged(onto, "nf4")
            yield f"onto {onto}, NF4 calibrated", lambda onto=onto: self._merged(onto, "nf4", chosen=True)
        for onto in ("trained", "original"):
            yield f"onto {onto}, int8", lambda onto=onto: self._merged(onto, "int8")
            yield f"onto {onto}, FP4 nearest", lambda onto=onto: self._merged(onto, "fp4")
            yield f"onto {onto}, FP4 calibrated", lambda onto=onto: self._merged(onto, "fp4", chosen=True)

    def _expected(self) -> list[torch.Tensor]:
        """The live model's log-probabilities, a text each, float16."""
        if self._live is None:
            self._live = self._answers(self._sums(adapted=True, trained=True))
        return self._live

    def _sums(self, *, adapted: bool, trained: bool) -> Weights:
        checkpoint = open_checkpoint(self._base)
        adapter = read_adapter(self._adapter) if adapted else None
        plan = plan_sums(adapter, checkpoint, Quantization() if trained else None)
        sums = {name: compute for shard in checkpoint.shards for name, compute in plan.sums_of(shard)}
        return lambda module: sums[f"{module}.weight"]()

    def _merged(self, onto: Any, storage: Any, chosen: bool = False) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM

        calibration = None
        if chosen:
            texts = sample_texts(self._train, self._tokenizer)
            calibration = CalibrationText(self._train.name, sha256_file(self._train), texts, _tell_layer)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            out = Path(name) / "out"
            report = merge_adapter(
                self._adapter, self._base, out, onto=onto, storage=storage, calibration=calibration
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

    def _peft(self) -> dict[str, Any]:
        import warnings

        from peft import PeftModel

        from adapterhub.trainer.model import load_base

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(
                load_base(self._base, Quantization(), "cpu"), str(self._adapter)
            ).merge_and_unload()
        return self._measure(weights_in(model))

    def _measure(self, weights: Weights | None) -> dict[str, Any]:
        return self._report(self._answers(weights))

    def _answers(self, weights: Weights | None) -> list[torch.Tensor]:
        """Log-probabilities of a model with these weights in its linear layers; None: the base's own."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32).eval()
        with torch.inference_mode():
            if weights is not None:
                for name, module in model.named_modules():
                    if isinstance(module, torch.nn.Linear) and ".layers." in name:
                        module.weight.copy_(weights(name))
            return [
                model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1).half()
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


def train_adapter(base: Path, data: Path, rank: int, folder: Path) -> Path:
    """A plain PEFT folder: LoRA on all linear layers, trained as the head says; taken if it is there."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    out = folder / f"sft-rank-{rank}"
    if out.is_dir():
        return out
    tokenizer = load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            through_4bit_(parameter.data, Quantization())
    model.float().requires_grad_(False)
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0)
    rows = read_rows(data, "train")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    step = 0
    for number in order:
        row = encode(tokenizer, rows[number].messages)
        labels = torch.tensor(row.labels[1:])
        spoken = (labels != IGNORED).nonzero()[:, 0]
        if len(row.input_ids) > LONGEST or len(spoken) == 0:
            continue
        for group in optimizer.param_groups:
            rise = min(1.0, (step + 1) / WARMUP)
            group["lr"] = LEARNING_RATE * rise * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        hidden = model.model(input_ids=torch.tensor([row.input_ids]), use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[0, spoken]), labels[spoken])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            print(f"rank {rank}, step {step}: loss {float(loss.detach()):.3f}", file=sys.stderr, flush=True)
        if step == STEPS:
            break
    adapted.save_pretrained(out)
    return out


def quantizing_speed() -> dict[str, Any]:
    """Weights a second into NF4, double quantization: bitsandbytes alone, and as a merge stores them."""
    from bitsandbytes import functional as bnb

    from adapterhub.packaging.layout import BLOCK, Layout, Quantized4bit, encode_4bit
    from adapterhub.packaging.tensors import TensorEntry

    weight = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16)
    entry = TensorEntry("weight", "BF16", tuple(weight.shape), 0, 2 * weight.numel())
    (parts,) = Layout("nf4", frozenset({"weight"})).place([entry])

    def ours() -> None:
        codes, state = bnb.quantize_4bit(
            weight.view(-1), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )
        encode_4bit(Quantized4bit(codes.view(-1), state.absmax, state.code), parts, tuple(weight.shape))

    def alone() -> None:
        bnb.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")

    speeds = {name: weight.numel() / _best(work) for name, work in (("ours", ours), ("alone", alone))}
    return {
        "weights_a_second_as_a_merge_stores_them": round(speeds["ours"]),
        "weights_a_second_of_quantize_4bit": round(speeds["alone"]),
        "ratio": round(speeds["ours"] / speeds["alone"], 3),
    }


def _best(work: Callable[[], None]) -> float:
    """Seconds of the fastest of five runs, after one to warm up."""
    work()
    times = []
    for _run in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _tell_layer(done: int, total: int) -> None:
    print(f"choosing codes: layer {done} of {total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
