"""Two gloo processes on the CPU, started as a launcher starts them: one adapter, as from one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterhub import Recipe
from adapterhub.errors import RecipeError
from adapterhub.packaging.evidence import CURVE
from adapterhub.trainer.batches import StepBatches
from adapterhub.trainer.checkpoints import run_folder
from adapterhub.trainer.ranks import share
from adapterhub.trainer.sharding import check_shardable

Run = Callable[..., tuple[int, str, str]]
Interrupting = Callable[[int], AbstractContextManager[None]]
EXACT = ("lora.dropout=0", "training.batch_size=8", "training.micro_batch=2", "training.save_every=2")


@pytest.mark.parametrize("rows", [1, 7, 8, 29])
def test_a_step_holds_the_same_rows_however_it_is_divided(rows: int) -> None:
    def steps(micro: int, processes: int, epoch: int) -> list[list[int]]:
        shares = [
            StepBatches(rows, 8, micro, seed=3, process=process, processes=processes)
            for process in range(processes)
        ]
        for batches in shares:
            batches.set_epoch(epoch)
        lists = [list(batches) for batches in shares]
        assert {len(found) for found in lists} == {len(shares[0])}
        each = 8 // (micro * processes)
        return [
            sorted(row for found in lists for batch in found[at : at + each] for row in batch)
            for at in range(0, len(lists[0]), each)
        ]

    whole = steps(8, 1, 0)
    assert sorted(row for step in whole for row in step if row < rows) == list(range(rows))
    for micro, processes in ((1, 1), (4, 2), (1, 4), (1, 8)):
        assert steps(micro, processes, 0) == whole
    if rows > 8:
        assert steps(8, 1, 1) != whole


def launch(
    recipe: Path,
    out: Path,
    *arguments: str,
    processes: int = 2,
    module: tuple[str, ...] = ("-m", "adapterhub"),
    fsdp: bool = False,
    gpus: str = "",
) -> subprocess.CompletedProcess[str]:
    """`torchrun`, which is what `accelerate launch` runs too; with gloo on the CPU unless it may see GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [*module, "train", str(recipe), "--out", str(out), *arguments]
    # What `accelerate launch --use_fsdp` sets.
    sharded = {"ACCELERATE_USE_FSDP": "true"} if fsdp else {}
    return on_the_cpu(command, CUDA_VISIBLE_DEVICES=gpus, **sharded)


def accelerated(recipe: Path, out: Path, *arguments: str, fsdp: bool) -> subprocess.CompletedProcess[str]:
    """Accelerate's own launcher, as the documentation has it."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", "--use_fsdp" if fsdp else "--cpu"]
    return on_the_cpu([*command, "-m", "adapterhub", "train", str(recipe), "--out", str(out), *arguments])


def on_the_cpu(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)


def sets(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def losses(release: Path) -> dict[int, tuple[float | None, float | None]]:
    points = json.loads((release / CURVE).read_bytes())["points"]
    return {point["step"]: (point["loss"], point["eval_loss"]) for point in points}


def assert_equal_runs(one: Path, other: Path, rel: float = 2e-3) -> None:
    assert losses(one).keys() == losses(other).keys()
    for step, (loss, held_out) in losses(one).items():
        assert losses(other)[step] == (
            pytest.approx(loss, rel=rel) if loss is not None else None,
            pytest.approx(held_out, rel=rel) if held_out is not None else None,
        )
    first, second = (load_file(run / "adapter_model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("start", [launch, accelerated])
def test_two_processes_train_what_one_does(
    run_cli: Run,
    recipe: Path,
    tmp_path: Path,
    start: Callable[..., subprocess.CompletedProcess[str]],
    fsdp: bool,
) -> None:
    whole, pair = tmp_path / "whole", tmp_path / "pair"
    assert run_cli("train", recipe, "--out", whole, *sets(*EXACT))[0] == 0
    done = start(recipe, pair, "--json", *sets(*EXACT), fsdp=fsdp)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "tiny-counts"  # one process prints
    assert done.stderr.count("step 8/8") == 1
    assert done.stderr.count("examples in") == 1
    assert not run_folder(pair).exists()
    assert_equal_runs(whole, pair)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_gpus_over_nccl_train_what_one_does_and_one_goes_on_for_two(
    run_cli: Run, recipe: Path, tmp_path: Path, interrupting: Interrupting, fsdp: bool
) -> None:
    whole, pair, resumed = tmp_path / "whole", tmp_path / "pair", tmp_path / "resumed"
    assert run_cli("train", recipe, "--out", whole, *sets(*EXACT))[0] == 0
    done = launch(recipe, pair, "--json", *sets(*EXACT), fsdp=fsdp, gpus="0,1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "tiny-counts"
    assert_equal_runs(whole, pair, rel=2e-2)  # one GPU takes the fast path, in other bf16 sums
    with interrupting(5):
        assert run_cli("train", recipe, "--out", resumed, *sets(*EXACT))[0] == 130
    done = launch(recipe, resumed, "--resume", *sets(*EXACT), fsdp=fsdp, gpus="0,1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resuming from checkpoint-4") == 1
    assert_equal_runs(whole, resumed, rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_stopped_run_goes_on_with_another_number_of_processes(
    run_cli: Run, recipe: Path, tmp_path: Path, interrupting: Interrupting, fsdp: bool
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_cli("train", recipe, "--out", whole, *sets(*EXACT))[0] == 0
    with interrupting(5):
        assert run_cli("train", recipe, "--out", resumed, *sets(*EXACT))[0] == 130
    done = launch(recipe, resumed, "--resume", *sets(*EXACT), fsdp=fsdp)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resuming from checkpoint-4") == 1
    assert_equal_runs(whole, resumed)


FAILING = """
import os, sys
from adapterhub.cli import main

if os.environ["RANK"] == sys.argv.pop(1):
    import torch
    from adapterhub.trainer.loop import AdapterTrainer

    real = AdapterTrainer.training_step

    def step(self, *arguments):
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments)

    AdapterTrainer.training_step = step
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_an_error_in_one_process_ends_all_with_one_message_and_one_process_goes_on(
    run_cli: Run, recipe: Path, tmp_path: Path, fsdp: bool
) -> None:
    """The second process must fail on command here: step 4 finds no memory in it alone."""
    script, whole, out = tmp_path / "failing.py", tmp_path / "whole", tmp_path / "out"
    script.write_text(FAILING)
    failed = launch(recipe, out, *sets(*EXACT), module=(str(script), "1"), fsdp=fsdp)
    assert failed.returncode == 1
    messages = [line for line in failed.stderr.splitlines() if line.startswith(("error: ", "fix: "))]
    assert messages == [
        "error: process 1 is out of memory in step 4",
        "fix: set training.micro_batch below 2 and go on with --resume",
    ]
    assert not out.exists()
    assert run_cli("train", recipe, "--out", whole, *sets(*EXACT))[0] == 0
    smaller = sets(*EXACT, "training.micro_batch=1")  # as it was told
    code, _, stderr = run_cli("train", recipe, "--out", out, "--resume", *smaller)
    assert code == 0, stderr
    assert "resuming from checkpoint-2" in stderr
    assert_equal_runs(whole, out)


@pytest.mark.slow
def test_a_batch_that_cannot_be_divided_is_said_once(recipe: Path, tmp_path: Path) -> None:
    done = launch(recipe, tmp_path / "out", "--set", "training.batch_size=6", processes=2)
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert messages == [
        "error: training.batch_size 6 cannot be divided among 2 processes with micro-batches of 2"
    ]


@pytest.mark.slow
def test_what_fsdp_cannot_divide_is_refused_once(recipe: Path, tmp_path: Path) -> None:
    done = launch(recipe, tmp_path / "out", *sets("lora.dora=true"), fsdp=True)
    assert done.returncode != 0
    assert done.stderr.count("error: lora.dora needs whole weights") == 1


@pytest.mark.parametrize(
    "change",
    [
        "quantization.type=int8",
        "lora.dora=true",
        "lora.new_tokens=['<a>']",
        "training.optimizer=paged_adamw_8bit",
    ],
)
def test_what_fsdp_cannot_divide_is_named(recipe: Path, change: str) -> None:
    with pytest.raises(RecipeError, match=change.partition("=")[0]):
        check_shardable(Recipe.read(recipe, [change]))


@pytest.mark.parametrize(("batch", "micro"), [(6, 2), (7, "auto")])
def test_a_batch_is_shared_evenly_or_not_at_all(recipe: Path, batch: int, micro: int | str) -> None:
    wanted = Recipe.read(recipe, [f"training.batch_size={batch}", f"training.micro_batch={micro}"])
    with pytest.raises(RecipeError, match="cannot be divided among 2 processes"):
        share(wanted, 2)
    assert share(wanted, 1) == wanted
    even = Recipe.read(recipe, ["training.batch_size=16", "training.micro_batch=2"])
    assert share(even, 4).training.batch_size == 4
