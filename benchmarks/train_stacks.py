"""One training stack measured in this process: ours, plain transformers + peft + bitsandbytes, or Unsloth.

``train_speed.py`` starts it as ``python train_stacks.py JOB.json RESULTS.jsonl`` and reads a line of JSON for
each setting as soon as it has been measured; a setting that does not fit or fails is a line too.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK, ALPHA = 64, 16
ROWS_A_STEP = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Batch = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What to measure."""

    stack: str
    """``ours``, ``peft`` or ``unsloth``."""
    size: str
    """One of ``synthetic_model.MODELS``."""
    length: int
    """Tokens a row."""
    documents: int
    """Sequences a row, of equal length."""
    settings: list[dict[str, Any]]
    """Tried in this order; for ours, the keys of ``Setting`` or ``{"plan": true}``."""
    cap_bytes: int
    """What torch's allocator may take."""
    seconds: float
    """About how long each setting is timed; 0: only its memory is measured."""
    profile: bool


@dataclass
class Stack:
    """A model ready to train: how to prepare a batch, take its loss, and step."""

    setting: dict[str, Any]
    prepare: Callable[[Batch], Batch]
    loss: Callable[[Batch], Any]
    step: Callable[[], None]
    precision: Callable[[], AbstractContextManager[Any]]
    predicted: int | None = None
    """Peak bytes by the ledger, for ours."""


def main() -> int:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    out = Path(sys.argv[2])
    if job.stack == "unsloth":
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
        import unsloth  # noqa: F401 - it patches what is imported after it
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap_bytes / total))
    say(out, {"kind": "machine", **describe(job.stack)})
    for setting in job.settings:
        began = time.monotonic()
        try:
            found = measure(job, setting)
        except torch.OutOfMemoryError as err:
            found = {"failed": "out of memory", "message": str(err).splitlines()[0][:200]}
        except Exception as err:
            traceback.print_exc()
            found = {"failed": type(err).__name__, "message": str(err)[:500]}
        line = {
            "kind": "setting",
            "stack": job.stack,
            "size": job.size,
            "length": job.length,
            "asked": setting,
        }
        say(
            out,
            {**line, "documents": job.documents, **found, "wall_seconds": round(time.monotonic() - began, 1)},
        )
        release()
    return 0


def measure(job: Job, setting: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second and peak memory of whole optimizer steps of 16 rows, after a warm-up."""
    import torch
    from synthetic_model import random_rows

    device = torch.device("cuda")
    release()
    torch.cuda.reset_peak_memory_stats()
    stack = {"ours": build_ours, "peft": build_peft, "unsloth": build_unsloth}[job.stack](
        job, setting, device
    )
    built = torch.cuda.memory_allocated()
    rows = int(stack.setting["micro_batch"])
    accumulation = ROWS_A_STEP // rows
    batches = [stack.prepare(random_rows(rows, job.length, job.documents, device)) for _ in range(4)]

    def micro_batch(index: int) -> Any:
        batch = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batches[index % len(batches)].items()
        }
        with stack.precision():
            loss = stack.loss(batch)
        (loss / accumulation).backward()
        return loss.detach()

    losses = []
    for index in range(2):  # compiles, chooses kernels, makes the optimizer's state
        losses.append(micro_batch(index))
        if index == 0:
            stack.step()
    torch.cuda.synchronize()
    found: dict[str, Any] = {
        "setting": stack.setting,
        "predicted_peak_bytes": stack.predicted,
        "built_bytes": built,
    }
    if job.seconds:
        found |= timed(micro_batch, stack.step, accumulation, job)
    else:
        stack.step()
        torch.cuda.synchronize()
    free, whole = torch.cuda.mem_get_info()
    found |= {
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "context_bytes": whole - free - torch.cuda.memory_reserved(),
        "losses": [round(float(loss), 4) for loss in losses],
    }
    if job.profile:
        found["profile"] = profile(lambda: (micro_batch(0), stack.step()))
    return found


def timed(
    micro_batch: Callable[[int], Any], step: Callable[[], None], accumulation: int, job: Job
) -> dict[str, Any]:
    """Steps of ``accumulation`` micro-batches by CUDA events, as many as ``job.seconds`` hold."""
    import torch

    began = time.monotonic()
    micro_batch(2)
    torch.cuda.synchronize()
    steps = max(1, min(6, round(job.seconds / ((time.monotonic() - began) * accumulation))))
    step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        for index in range(accumulation):
            micro_batch(index)
        step()
    end.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(end) / 1000
    return {
        "tokens_per_second": round(steps * ROWS_A_STEP * job.length / seconds, 1),
        "timed_steps": steps,
        "seconds_a_step": round(seconds / steps, 4),
    }


def build_ours(job: Job, setting: dict[str, Any], device: Any) -> Stack:
    """The planner's engine and setting for a card of the cap's size, or the setting given."""
    import torch
    from synthetic_model import shape_of_size, synthetic_model

    from adapterhub.packaging.manifest import Hardware
    from adapterhub.trainer.activations import Setting
    from adapterhub.trainer.engines import engine_for
    from adapterhub.trainer.fast.install import FastPath, LinearsPath, install_blocks, install_linears
    from adapterhub.trainer.ledger import ledger
    from adapterhub.trainer.plan import plan
    from adapterhub.trainer.recipe import Recipe

    hardware = Hardware(device="cuda", name=torch.cuda.get_device_name(), memory_bytes=job.cap_bytes)
    content = {
        "name": "bench", "base": "synthetic", "data": {"train": "synthetic", "max_length": job.length},
        "lora": {"rank": RANK, "alpha": ALPHA}, "training": {"batch_size": ROWS_A_STEP},
    }  # fmt: skip
    recipe = Recipe.from_dict(content, Path())
    shape = shape_of_size(job.size)
    if setting.get("plan"):
        chosen = plan(shape, recipe, hardware).setting
    else:
        chosen = Setting(**{"engine": engine_for(shape, recipe, hardware), **setting})
    model = with_adapter(synthetic_model(job.size, device), device)
    if chosen.engine == "linears" and chosen.recompute_all:  # of transformers' layers, by transformers
        model.gradient_checkpointing_enable({"use_reentrant": False})
    install, path = (install_blocks, FastPath) if chosen.engine == "fast" else (install_linears, LinearsPath)
    fast = install(model.get_base_model(), chosen, torch.bfloat16, device)
    optimizer = fast.optimizer(recipe, chosen)
    return Stack(
        setting=vars(chosen),
        prepare=path.prepare,
        loss=lambda batch: model(**batch).loss,
        step=optimizer.step,
        precision=nullcontext,
        predicted=ledger(shape, recipe, hardware, chosen).predicted_peak_bytes,
    )


def build_peft(job: Job, setting: dict[str, Any], device: Any) -> Stack:
    """transformers and peft as they are, adapters in bf16, which is their fastest."""
    import torch
    from synthetic_model import synthetic_model

    model = with_adapter(synthetic_model(job.size, device), device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    if setting["recompute"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return plain_stack(model, setting, nullcontext)


def build_unsloth(job: Job, setting: dict[str, Any], device: Any) -> Stack:
    """Unsloth's own patches on the same weights: its loader is given the synthetic model in place of a
    file's.
    """
    import torch
    import unsloth.models.llama as patched
    from synthetic_model import synthetic_model
    from unsloth import FastLanguageModel

    class Synthetic:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> Any:
            return synthetic_model(job.size, device)

    loader, patched.AutoModelForCausalLM = patched.AutoModelForCausalLM, Synthetic
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer_and_config(Path(folder), job.size)
            model, _ = FastLanguageModel.from_pretrained(
                folder, max_seq_length=job.length, dtype=torch.bfloat16, load_in_4bit=True,
                device_map={"": 0}, local_files_only=True,
            )  # fmt: skip
    finally:
        patched.AutoModelForCausalLM = loader
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing=setting["recompute"], random_state=0, max_seq_length=job.length,
    )  # fmt: skip
    if setting.get("bf16_adapters"):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=setting["recompute"])
    return plain_stack(model, setting, lambda: torch.autocast("cuda", torch.bfloat16), positions=False)


def plain_stack(
    model: Any,
    setting: dict[str, Any],
    precision: Callable[[], AbstractContextManager[Any]],
    *,
    positions: bool = True,
) -> Stack:
    """Any transformers model with torch's fused AdamW, or bitsandbytes' paged 8-bit one."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if setting.get("optimizer") == "paged_adamw_8bit":
        from bitsandbytes.optim import PagedAdamW8bit

        optimizer: Any = PagedAdamW8bit(parameters, lr=2e-4)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    model.train()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def prepare(batch: Batch) -> Batch:
        return (
            batch if positions else {name: value for name, value in batch.items() if name != "position_ids"}
        )

    return Stack(setting, prepare, lambda batch: model(**batch, use_cache=False).loss, step, precision)


def with_adapter(model: Any, device: Any) -> Any:
    """A peft model with LoRA on every linear; B is not zero, as after some steps."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM")
    with device:
        peft_model = get_peft_model(model, lora)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=1e-3)
    return peft_model


def write_tokenizer_and_config(folder: Path, size: str) -> None:
    """What Unsloth's loader reads beside the weights: config.json and a tokenizer of the right size."""
    from synthetic_model import VOCABULARY, config_of
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config_of(size)))


def profile(work: Callable[[], Any]) -> dict[str, Any]:
    """Where the device's time goes in one micro-batch and a step: milliseconds by kernel, largest first."""
    import torch
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        began = time.monotonic()
        work()
        launched = time.monotonic() - began
        torch.cuda.synchronize()
        wall = time.monotonic() - began
    kernels: dict[str, list[float]] = {}
    for event in record.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = kernels.setdefault(event.name[:90], [0.0, 0])
            entry[0] += event.time_range.elapsed_us() / 1000
            entry[1] += 1
    rows = sorted(
        ((name, round(ms, 3), int(n)) for name, (ms, n) in kernels.items()), key=lambda row: -row[1]
    )
    busy = sum(row[1] for row in rows)
    return {
        "wall_ms": round(wall * 1000, 2),
        "launch_ms": round(launched * 1000, 2),
        "device_ms": round(busy, 2),
        "launches": sum(row[2] for row in rows),
        "kernels": rows[:40],
    }


def matrix_rate() -> float:
    """FLOP/s of a product of two 8192 × 8192 bf16 matrices of random numbers: the median of ten."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(left, right)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return float(2 * 8192**3 / sorted(times[5:])[5])


def describe(stack: str) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch

    names = ["torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate"]
    names += ["unsloth", "unsloth_zoo", "trl"] if stack == "unsloth" else []
    rate = matrix_rate()
    release()
    return {
        "stack": stack,
        "device": torch.cuda.get_device_name(),
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "cuda": torch.version.cuda,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "matrix_flops": rate,
    }


def release() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def say(out: Path, line: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = {key: value for key, value in line.items() if key not in ("profile", "versions")}
    print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    sys.exit(main())
