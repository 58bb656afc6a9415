"""A merge that is cut off: by SIGKILL, by SIGTERM, by Ctrl-C; and the run that goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub.errors import ReleaseError, TrainingError
from adapterhub.packaging.merge import merge_adapter
from adapterhub.packaging.release import Release
from adapterhub.packaging.staging import resumable_folder, unfinished

RunCli = Callable[..., tuple[int, str, str]]

# Stops itself by a signal when the bytes of two shards are done, and waits to be hit.
STOP_ITSELF = """
import os, signal, sys, time
from adapterhub.packaging import writing
from adapterhub.cli import main
number, *arguments = sys.argv[1:]
note = writing._note
def note_and_stop(staging, name, made):
    note(staging, name, made)
    if len(staging.done) == 2:
        os.kill(os.getpid(), int(number))
        time.sleep(1)
writing._note = note_and_stop
raise SystemExit(main(arguments))
"""


@pytest.fixture
def sharded(tiny_base: Path, tmp_path: Path) -> Path:
    """The small base in small shards."""
    from transformers import AutoModelForCausalLM

    target = tmp_path / "sharded"
    shutil.copytree(tiny_base, target)
    (target / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size="60KB")
    return target


def arguments(adapter: Path, base: Path, out: Path, *more: str) -> list[str]:
    return ["merge", str(adapter), "--base", str(base), "--out", str(out), "--onto", "trained", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_a_killed_merge_goes_on_at_the_shard_it_was_in(
    tiny_adapter: Path, sharded: Path, tmp_path: Path, run_cli: RunCli, number: int, storage: str
) -> None:
    out = tmp_path / "out"
    options = ("--to", storage, "--json")
    command = [
        sys.executable,
        "-c",
        STOP_ITSELF,
        str(int(number)),
        *arguments(tiny_adapter, sharded, out, *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == (143 if number == signal.SIGTERM else -number), done.stderr
    left = unfinished(out)
    assert left is not None
    assert not out.exists()
    finished = {path: path.stat().st_mtime_ns for path in sorted((left / "files").iterdir())}
    noted = [json.loads(line)["name"] for line in (left / "journal.jsonl").read_text().splitlines()[1:]]
    kept = {path.name: time for path, time in finished.items() if path.name in noted}

    code, printed, _err = run_cli(*arguments(tiny_adapter, sharded, out, *options))
    assert code == 0
    assert json.loads(printed)["resumed"] == len(noted) >= 2
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert unfinished(out) is None
    whole = tmp_path / "whole"
    assert run_cli(*arguments(tiny_adapter, sharded, whole, *options))[0] == 0
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_a_killed_choice_of_targets_goes_on_with_the_one_it_was_in(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    options = ["--onto", "auto", "--to", "nf4", "--held-out", text, "--base", tiny_base, "--out", out]
    command = ["merge", str(tiny_release), *map(str, options), "--json"]
    script = [
        sys.executable,
        "-c",
        STOP_ITSELF.replace("len(staging.done) == 2", "'original' in str(staging.folder)"),
    ]
    done = subprocess.run(
        [*script, str(int(signal.SIGKILL)), *command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = unfinished(out)
    assert left is not None
    made = (left / "scratch" / "trained" / "model.safetensors").stat().st_mtime_ns
    begun = (left / "scratch" / ".original.partial" / "files" / "model.safetensors").stat().st_mtime_ns

    code, printed, err = run_cli(*command)
    assert code == 0, err
    result = json.loads(printed)
    assert result["resumed"] == (1 if result["onto"] == "original" else 0)
    assert (out / "model.safetensors").stat().st_mtime_ns == (begun if result["onto"] == "original" else made)
    Release.open(out).check_files()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "tiny-orders"]
    whole = tmp_path / "whole"
    code, printed, _err = run_cli(*[whole if part == str(out) else part for part in command])
    assert code == 0
    assert json.loads(printed)["fidelity"]["figures"] == result["fidelity"]["figures"]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def interrupt_after(shards: int) -> Callable[[int, int], None]:
    """A progress that raises an interrupt when about so many of the small shards are done."""

    def progress(done: int, _all: int) -> None:
        if done > shards * 60_000:
            raise KeyboardInterrupt

    return progress


def cut_off(adapter: Path, base: Path, out: Path, **settings: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(adapter, base, out, threads=1, progress=interrupt_after(3), **settings)
    left = unfinished(out)
    assert left is not None
    return left


def test_a_release_is_resumed_and_is_sound(tiny_release: Path, sharded: Path, tmp_path: Path) -> None:
    from adapterhub.packaging.base import lock_base

    manifest = Release.open(tiny_release).manifest
    manifest = manifest.model_copy(update={"base": lock_base(sharded, name="tiny-llama")})
    (tiny_release / "adapterhub.json").write_bytes(manifest.to_bytes())
    out = tmp_path / "out"
    cut_off(tiny_release, sharded, out, onto="original")
    report = merge_adapter(tiny_release, sharded, out, onto="original")
    assert report.resumed > 0
    assert report.release is not None
    report.release.check_files()


def test_only_the_same_merge_goes_on(tiny_adapter: Path, sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut_off(tiny_adapter, sharded, out, onto="original")
    assert merge_adapter(tiny_adapter, sharded, out, onto="original", storage="int8").resumed == 0
    shutil.rmtree(out)
    cut_off(tiny_adapter, sharded, out, onto="original")
    first = min(sharded.glob("*.safetensors"))
    os.utime(first)  # it may have been written again
    assert merge_adapter(tiny_adapter, sharded, out, onto="original").resumed == 0


def test_a_damaged_leftover_is_made_again(tiny_adapter: Path, sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = cut_off(tiny_adapter, sharded, out, onto="original")
    lines = (left / "journal.jsonl").read_text().splitlines()
    name = json.loads(lines[1])["name"]
    (left / "files" / name).write_bytes(b"short")
    (left / "journal.jsonl").write_text(
        "\n".join(lines) + '\n{"name": "tor'
    )  # power went while it was written
    report = merge_adapter(tiny_adapter, sharded, out, onto="original")
    assert report.resumed == len(lines) - 2
    whole = tmp_path / "whole"
    merge_adapter(tiny_adapter, sharded, whole, onto="original")
    assert contents(out) == contents(whole)


def test_an_error_leaves_nothing_to_go_on_from(tiny_adapter: Path, sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut_off(tiny_adapter, sharded, out, onto="original")
    last = max(sharded.glob("*.safetensors"))

    def shrink(_done: int, _all: int) -> None:
        last.write_bytes(last.read_bytes()[:-50])

    with pytest.raises(ReleaseError, match="ended while it was read"):
        merge_adapter(tiny_adapter, sharded, out, onto="original", threads=1, progress=shrink)
    assert unfinished(out) is None
    assert not out.exists()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with resumable_folder(tmp_path / "out", "a") as staging:
        (staging.folder / "file").write_text("first")
        with (
            pytest.raises(ReleaseError, match="another process is making"),
            resumable_folder(tmp_path / "out", "a"),
        ):
            pass
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert unfinished(tmp_path / "out") is None


def test_a_release_does_not_go_on_from_what_its_plain_adapter_began(
    tiny_adapter: Path, tiny_release: Path, sharded: Path, tmp_path: Path
) -> None:
    """Its base's digest is looked at, which the plain one's finished shards do not have."""
    out = tmp_path / "out"

    def stop(done: int, whole: int) -> None:
        if done > whole // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(tiny_adapter, sharded, out, onto="trained", threads=1, progress=stop)
    assert unfinished(out) is not None
    report = merge_adapter(
        tiny_release, sharded, out, onto="trained", allow_base_mismatch="the same weights in other files"
    )
    assert report.resumed == 0
    assert report.release is not None
    report.release.check_files()


@pytest.mark.parametrize("error", [TrainingError("no memory", "end what else runs"), BrokenPipeError()])
def test_what_is_finished_outlives_what_passes(tmp_path: Path, error: Exception) -> None:
    """A device without memory for the moment, and a reader of the output that went away."""

    def work(staging: Any) -> None:
        (staging.folder / "one").write_bytes(b"1")
        staging.note("one", None, {})
        raise error

    with pytest.raises(type(error)), resumable_folder(tmp_path / "out", "key") as staging:
        work(staging)
    assert unfinished(tmp_path / "out") is not None
