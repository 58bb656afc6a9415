"""Training from the command line: what comes out, what is said, and what happens when it goes wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from adapterhub import Recipe, Release
from adapterhub.packaging.evidence import CURVE, LEDGER
from adapterhub.trainer.checkpoints import run_folder

Run = Callable[..., tuple[int, str, str]]
Interrupting = Callable[[int], AbstractContextManager[None]]


def adapter_bytes(release: Path) -> bytes:
    return (release / "adapter_model.safetensors").read_bytes()


def points(release: Path) -> list[dict]:
    return json.loads((release / CURVE).read_bytes())["points"]


def test_a_run_ends_in_a_sound_release_that_says_what_it_was_made_from(
    run_cli: Run, recipe: Path, tmp_path: Path, tiny_base: Path
) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run_cli("train", recipe, "--out", out, "--json")
    assert code == 0, stderr
    release = Release.open(out)
    release.check_files()
    manifest = release.manifest
    assert json.loads(stdout)["digest"] == release.digest
    assert manifest.base is not None
    assert manifest.base.quantization is not None
    assert (manifest.base.name, manifest.base.quantization.type, manifest.base.quantization.double) == (
        tiny_base.name,
        "nf4",
        True,
    )
    assert [(lock.source, lock.split, lock.rows) for lock in manifest.datasets] == [
        ("train.jsonl", "train", 40),
        ("test.jsonl", "test", 8),
    ]
    assert manifest.recipe is not None
    assert manifest.recipe["lora"]["rank"] == 4
    assert {"adapterhub", "torch", "transformers", "peft", "bitsandbytes"} <= set(manifest.tools)
    assert not run_folder(out).exists()
    assert "step 8/8" in stderr

    curve = json.loads((out / CURVE).read_bytes())
    losses = {point["step"]: point["loss"] for point in curve["points"] if point["loss"] is not None}
    held_out = {
        point["step"]: point["eval_loss"] for point in curve["points"] if point["eval_loss"] is not None
    }
    assert sorted(losses) == list(range(1, 9))
    assert sorted(held_out) == [0, 2, 4, 6, 8]
    assert held_out[8] < held_out[0]
    ledger = json.loads((out / LEDGER).read_bytes())
    assert ledger["measured_peak_bytes"] > 0
    assert ledger["predicted_peak_bytes"] == sum(p["bytes"] for p in ledger["parts"] if p["on"] == "device")


@pytest.mark.slow
def test_the_recipe_in_a_manifest_trains_the_same_adapter_again(
    run_cli: Run, recipe: Path, tmp_path: Path, tiny_base: Path, rows: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_cli("train", recipe, "--out", first)[0] == 0
    replay = Release.open(first).manifest.recipe
    assert replay is not None
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / replay["base"]).symlink_to(tiny_base)
    (tmp_path / "again" / "rows").symlink_to(rows)
    (tmp_path / "again" / "recipe.yaml").write_text(json.dumps(replay))  # JSON is YAML
    assert run_cli("train", tmp_path / "again" / "recipe.yaml", "--out", second)[0] == 0
    assert adapter_bytes(first) == adapter_bytes(second)


@pytest.mark.parametrize("stop_at", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_interrupted_at_any_step_resumes_to_the_same_bytes(
    run_cli: Run, recipe: Path, tmp_path: Path, interrupting: Interrupting, stop_at: int
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_cli("train", recipe, "--out", whole)[0] == 0

    with interrupting(stop_at):
        code, _, stderr = run_cli("train", recipe, "--out", resumed)
    assert code == 130
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert not resumed.exists()

    if stop_at > 3:  # there is a checkpoint to lose
        code, _, stderr = run_cli("train", recipe, "--out", resumed)
        assert code == 6
        assert "unfinished run" in stderr
    code, _, stderr = run_cli("train", recipe, "--out", resumed, "--resume")
    assert code == 0, stderr
    assert ("resuming from checkpoint-3" in stderr) == (stop_at > 3)
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert [(p["step"], p["loss"], p["eval_loss"]) for p in points(resumed)] == [
        (p["step"], p["loss"], p["eval_loss"]) for p in points(whole)
    ]


@pytest.mark.slow
def test_a_run_killed_with_sigkill_resumes_to_the_same_bytes(
    run_cli: Run, recipe: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_cli("train", recipe, "--out", whole, "--set", "training.steps=40")[0] == 0
    command = [sys.executable, "-m", "adapterhub", "train", str(recipe), "--out", str(killed)]
    command += ["--set", "training.steps=40"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(run_folder(killed).glob("checkpoint-*/complete")):
        assert process.poll() is None, "it ended before the first checkpoint"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    # A kill in the middle of a checkpoint leaves one without its mark: it must not be resumed from.
    (run_folder(killed) / "checkpoint-999").mkdir()
    assert subprocess.run([*command, "--resume"], check=False).returncode == 0
    assert adapter_bytes(killed) == adapter_bytes(whole)


@pytest.fixture
def interrupted(run_cli: Run, recipe: Path, tmp_path: Path, interrupting: Interrupting) -> Path:
    """Where a run was going that was interrupted in step 5, after the checkpoint of step 3."""
    out = tmp_path / "interrupted"
    with interrupting(5):
        assert run_cli("train", recipe, "--out", out)[0] == 130
    return out


@pytest.mark.slow
def test_a_run_is_only_resumed_as_itself(run_cli: Run, recipe: Path, interrupted: Path) -> None:
    code, _, stderr = run_cli("train", recipe, "--out", interrupted, "--resume", "--set", "lora.rank=2")
    assert code == 6
    assert "another recipe" in stderr
    for damaged in ("{", "[]", ""):
        (run_folder(interrupted) / "run.json").write_text(damaged)
        code, _, stderr = run_cli("train", recipe, "--out", interrupted, "--resume")
        assert code == 6
        assert "damaged" in stderr


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(run_cli: Run, recipe: Path, interrupted: Path) -> None:
    checkpoint = run_folder(interrupted) / "checkpoint-3"
    (run_folder(interrupted) / "checkpoint-mine").mkdir()  # not one of ours
    for name in ("optimizer.pt", "trainer_state.json"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(b"")
        code, _, stderr = run_cli("train", recipe, "--out", interrupted, "--resume")
        assert code == 6, stderr
        assert "checkpoint-3 cannot be resumed" in stderr
        (checkpoint / name).write_bytes(content)
    assert run_cli("train", recipe, "--out", interrupted, "--resume")[0] == 0


@pytest.mark.slow
def test_a_run_that_failed_before_its_first_checkpoint_is_in_nobodys_way(
    run_cli: Run, recipe: Path, tmp_path: Path, tiny_base: Path
) -> None:
    broken, out = tmp_path / "broken-base", tmp_path / "out"
    shutil.copytree(tiny_base, broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    code, _, stderr = run_cli("train", recipe, "--out", out, "--set", f"base={broken}")
    assert code == 3, stderr
    assert run_cli("train", recipe, "--out", out)[0] == 0


@pytest.mark.slow
def test_two_processes_never_train_into_one_folder(run_cli: Run, recipe: Path, interrupted: Path) -> None:
    from adapterhub.trainer.checkpoints import run_lock

    with run_lock(interrupted):  # as another process would hold it
        code, _, stderr = run_cli("train", recipe, "--out", interrupted, "--resume")
    assert code == 6
    assert "another process" in stderr
    assert run_cli("train", recipe, "--out", interrupted, "--resume")[0] == 0


@pytest.mark.slow
def test_held_out_rows_are_never_training_rows(
    run_cli: Run, recipe: Path, tmp_path: Path, rows: Path
) -> None:
    with (rows / "test.jsonl").open("a") as file:
        file.write((rows / "train.jsonl").read_text().splitlines()[0] + "\n")
    out = tmp_path / "out"
    code, _, stderr = run_cli("train", recipe, "--out", out)
    assert code == 0
    assert "left out" in stderr
    assert "test rows that are training rows too" in stderr
    held_out = [lock.rows for lock in Release.open(out).manifest.datasets if lock.split == "test"]
    assert held_out[0] <= 8
    code, _, stderr = run_cli(
        "train", recipe, "--out", tmp_path / "all", "--set", "data.test=rows/train.jsonl"
    )
    assert code == 2
    assert "training rows too" in stderr


@pytest.mark.slow
def test_accumulation_does_not_change_the_result(run_cli: Run, recipe: Path, tmp_path: Path) -> None:
    """Losses are means over tokens, not over micro-batches, whatever their lengths."""
    curves = []
    for micro in (1, 4):
        out = tmp_path / f"micro-{micro}"
        settings = [
            "lora.dropout=0",
            f"training.micro_batch={micro}",
            "data.packing=false",
            "quantization=null",
        ]
        assert run_cli("train", recipe, "--out", out, *[x for s in settings for x in ("--set", s)])[0] == 0
        curves.append([point["loss"] for point in points(out) if point["loss"] is not None])
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)  # bf16


@pytest.mark.slow
def test_the_held_out_loss_is_the_same_packed_or_not(run_cli: Run, recipe: Path, tmp_path: Path) -> None:
    found = []
    for packing in ("true", "false"):
        out = tmp_path / packing
        code, _, stderr = run_cli("train", recipe, "--out", out, "--set", f"data.packing={packing}")
        assert code == 0, stderr
        found.append(points(out)[0]["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.slow
def test_rows_longer_than_the_context_are_left_out_counted_and_said(
    run_cli: Run, recipe: Path, tmp_path: Path, rows: Path
) -> None:
    with (rows / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "long " * 100, "completion": "no"}) + "\n")
    out = tmp_path / "out"
    code, _, stderr = run_cli("train", recipe, "--out", out)
    assert code == 0
    assert "left out 1 of 41 train rows" in stderr
    assert "train.jsonl, line 41" in stderr
    assert Release.open(out).manifest.datasets[0].rows == 40

    code, _, stderr = run_cli("train", recipe, "--out", tmp_path / "none", "--set", "data.max_length=8")
    assert code == 2
    assert "longer than data.max_length 8" in stderr


def test_a_loss_that_is_not_a_number_stops_the_run(
    run_cli: Run, recipe: Path, tmp_path: Path, tiny_base: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken-base"
    shutil.copytree(tiny_base, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], math.nan)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    code, _, stderr = run_cli("train", recipe, "--out", out, "--set", f"base={broken}")
    assert code == 6
    assert "the loss is nan" in stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("override", "code", "problem"),
    [
        ("base=nowhere", 2, "nowhere: no such file or folder"),
        ("data.train=nowhere.jsonl", 2, "nowhere.jsonl"),
        ("data.train=rows", 0, ""),
        ("lora.target_modules=[q_proj, qq_proj]", 2, "qq_proj"),
        ("quantization.block_size=128", 2, "blocks of 64"),
        ("lora.rnk=3", 2, "did you mean lora.rank"),
    ],
)
def test_what_cannot_be_trained_is_said_before_training(
    run_cli: Run, recipe: Path, tmp_path: Path, override: str, code: int, problem: str
) -> None:
    found, _, stderr = run_cli("train", recipe, "--out", tmp_path / "out", "--set", override)
    assert found == code, stderr
    assert problem in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "out").exists() == (code == 0)


def test_an_existing_folder_is_not_trained_over(run_cli: Run, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    code, _, stderr = run_cli("train", recipe, "--out", out)
    assert code == 3
    assert "exists already" in stderr
    assert (out / "precious").read_text() == "x"


@pytest.mark.parametrize(
    "content", [b"", b'{"prompt": "a"}\n', b"\x80\x81", b'{"prompt": "a", "completion": "\\ud800"}\n']
)
def test_bad_data_is_refused_by_its_line(
    run_cli: Run, recipe: Path, tmp_path: Path, rows: Path, content: bytes
) -> None:
    (rows / "train.jsonl").write_bytes(content)
    code, _, stderr = run_cli("train", recipe, "--out", tmp_path / "out")
    assert code == 2, stderr
    assert "train.jsonl" in stderr
    assert not run_folder(tmp_path / "out").exists()


def test_a_pickle_base_and_a_broken_base_are_refused(run_cli: Run, recipe: Path, tmp_path: Path) -> None:
    base = tmp_path / "pickled"
    base.mkdir()
    (base / "config.json").write_text((Path(Recipe.read(recipe).base) / "config.json").read_text())
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    code, _, stderr = run_cli("train", recipe, "--out", tmp_path / "out", "--set", f"base={base}")
    assert code == 3
    assert "tokenizer" in stderr or "pickle" in stderr
    (base / "config.json").write_text("{")
    code, _, stderr = run_cli("train", recipe, "--out", tmp_path / "out", "--set", f"base={base}")
    assert code == 2
    assert "config.json" in stderr


@pytest.mark.slow
def test_a_full_disk_is_said_in_words_and_keeps_the_checkpoints(
    run_cli: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk must fail on command here: the adapter's file of the second checkpoint finds no space."""
    import safetensors.torch

    real = safetensors.torch.save_file
    calls = []

    def full(*arguments: object, **named: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments, **named)

    import peft.peft_model

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(peft.peft_model, "safe_save_file", full)
        code, _, stderr = run_cli("train", recipe, "--out", out)
    assert len(calls) == 2
    assert code == 1
    assert "no space left" in stderr
    assert "Traceback" not in stderr
    assert not out.exists()
    code, _, stderr = run_cli("train", recipe, "--out", out, "--resume")
    assert code == 0
    assert "resuming from checkpoint-3" in stderr


def test_evaluating_between_steps_does_not_cost_gradients(tiny_base: Path) -> None:
    """bitsandbytes repacks codes at the first forward without gradients; training must go on all the same."""
    import torch

    from adapterhub.packaging.manifest import Quantization
    from adapterhub.trainer.model import attach_adapter, load_base
    from adapterhub.trainer.recipe import LoraSection

    model = attach_adapter(load_base(tiny_base, Quantization(), "cpu"), LoraSection(rank=4), seed=0)
    ids = torch.arange(3, 35)[None]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        model.eval()
        model(input_ids=ids)
        model.train()
    after = gradients()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(gradient.abs().sum() > 0 for gradient in before.values())


IN_16_BITS = ["--set", "training.micro_batch=auto", "--set", "lora.dropout=0", "--set", "quantization=null"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail_at", "kind", "message"),
    [
        (0, "OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB"),
        (4, "OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB"),
        (4, "RuntimeError", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        (4, "RuntimeError", "Triton Error [CUDA]: out of memory"),
        (4, "MemoryError", ""),
    ],
)
def test_out_of_memory_is_planned_anew_and_nothing_is_lost(
    run_cli: Run,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail_at: int,
    kind: str,
    message: str,
) -> None:
    """The device must fail on command here: one micro-batch of step ``fail_at + 1`` finds no memory."""
    import torch

    from adapterhub.trainer import model as loading
    from adapterhub.trainer.loop import AdapterTrainer

    error = {"MemoryError": MemoryError, "RuntimeError": RuntimeError}.get(kind, torch.OutOfMemoryError)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run_cli("train", recipe, "--out", whole, *IN_16_BITS)[0] == 0
    real, sizes = AdapterTrainer.training_step, []
    real_load, bases = loading.load_base, []

    def step(self: AdapterTrainer, model: object, inputs: dict, *others: object) -> object:
        sizes.append(len(inputs["input_ids"]))
        if self.state.global_step == fail_at and sizes[-1] == sizes[0]:
            raise error(message)
        return real(self, model, inputs, *others)

    def load(*arguments: object, **named: object) -> object:
        assert not [base for base in bases if base() is not None], "the base before is still held"
        base = real_load(*arguments, **named)
        bases.append(weakref.ref(base))
        return base

    monkeypatch.setattr(AdapterTrainer, "training_step", step)
    monkeypatch.setattr(loading, "load_base", load)
    code, _, stderr = run_cli("train", recipe, "--out", out, *IN_16_BITS)
    assert code == 0, stderr
    assert len(bases) == 2
    assert f"out of memory in step {fail_at + 1}" in stderr
    assert sizes[-1] < sizes[0]
    ledger = json.loads((out / LEDGER).read_bytes())
    (miss,) = ledger["misses"]
    assert (miss["step"], miss["micro_batch"]) == (fail_at, sizes[0])
    assert miss["message"] == (message or "out of memory")
    assert 0 < miss["measured_peak_bytes"] <= ledger["measured_peak_bytes"]
    curve = {point["step"]: point["loss"] for point in points(out) if point["loss"] is not None}
    expected = {point["step"]: point["loss"] for point in points(whole) if point["loss"] is not None}
    assert curve == pytest.approx(expected, rel=2e-2)  # other micro-batches, bf16


@pytest.mark.slow
def test_out_of_memory_while_a_run_is_set_up_is_planned_anew_too(
    run_cli: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters, kept weights and buffers are allocated before the first step; here that fails once."""
    import torch

    from adapterhub.trainer.loop import AdapterTrainer

    real, calls = AdapterTrainer.__init__, []

    def init(self: AdapterTrainer, *arguments: object, **named: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(AdapterTrainer, "__init__", init)
    out = tmp_path / "out"
    code, _, stderr = run_cli("train", recipe, "--out", out, *IN_16_BITS)
    assert code == 0, stderr
    assert "out of memory while the run was set up" in stderr
    assert [miss["step"] for miss in json.loads((out / LEDGER).read_bytes())["misses"]] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["linears", "fast"])
def test_every_engine_trains_the_same_adapter(
    run_cli: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Those for CUDA compute on the CPU what their kernels are held to; the planner would not choose them."""
    from adapterhub.trainer import plan, settings

    settings_ = ["--set", "lora.dropout=0"]
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert run_cli("train", recipe, "--out", plain, *settings_)[0] == 0
    monkeypatch.setattr(plan, "engine_for", lambda *_: engine)
    monkeypatch.setattr(settings, "engine_for", lambda *_: engine)
    if not Path("/proc/cpuinfo").read_text().count("avx512_bf16"):  # there the base computes in float32
        settings_ += ["--set", "quantization.compute_dtype=float32"]
    code, _, stderr = run_cli("train", recipe, "--out", out, *settings_)
    assert code == 0, stderr
    for kind in ("loss", "eval_loss", "grad_norm"):
        ours, theirs = (
            {point["step"]: point[kind] for point in points(run) if point[kind] is not None}
            for run in (out, plain)
        )
        assert ours == pytest.approx(theirs, rel=2e-2 if kind != "grad_norm" else 0.1), kind
    from safetensors.torch import load_file

    first, second = (load_file(run / "adapter_model.safetensors") for run in (plain, out))
    assert first.keys() == second.keys()


@pytest.mark.slow
@pytest.mark.parametrize("fail_at", [4, 8])
def test_out_of_memory_in_a_held_out_loss_loses_neither_step_nor_loss(
    run_cli: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    import torch

    from adapterhub.trainer import loop

    real, failed = loop.held_out_loss, []

    def loss(trainer: loop.AdapterTrainer, rows: object) -> float:
        if trainer.state.global_step == fail_at and not failed:
            failed.append(fail_at)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(trainer, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "held_out_loss", loss)
    out = tmp_path / "out"
    code, _, stderr = run_cli("train", recipe, "--out", out, *IN_16_BITS)
    assert code == 0, stderr
    assert failed
    assert [point["step"] for point in points(out) if point["loss"] is not None] == list(range(1, 9))
    assert [point["step"] for point in points(out) if point["eval_loss"] is not None] == [0, 2, 4, 6, 8]


@pytest.mark.slow
def test_out_of_memory_with_nothing_left_to_give_is_said(
    run_cli: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from adapterhub.trainer.loop import AdapterTrainer

    def step(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AdapterTrainer, "training_step", step)
    code, _, stderr = run_cli("train", recipe, "--out", tmp_path / "out", "--set", "training.micro_batch=1")
    assert code == 6
    assert "does not fit" in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_base_that_bitsandbytes_gets_wrong_on_the_cpu_is_refused(
    run_cli: Run, recipe: Path, tmp_path: Path, tiny_base: Path
) -> None:
    """Rows of 96 weights end inside a block of 64; in 16 bits the same base can be trained."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    odd = tmp_path / "odd"
    config = LlamaConfig.from_pretrained(tiny_base)
    config.intermediate_size = 96
    LlamaForCausalLM(config).save_pretrained(odd)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(odd)
    code, _, stderr = run_cli("train", recipe, "--out", tmp_path / "out", "--set", f"base={odd}")
    assert code == 3
    assert "down_proj has 96 inputs" in stderr
    arguments = ("--set", f"base={odd}", "--set", "quantization=null")
    assert run_cli("train", recipe, "--out", tmp_path / "plain", *arguments)[0] == 0
