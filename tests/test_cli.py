"""What all commands share: how errors are told, what the exit codes say, how an interrupted one ends."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import adapterhub
from adapterhub import errors

Run = Callable[..., tuple[int, str, str]]
ADAPTERHUB = Path(sys.executable).with_name("adapterhub")


@pytest.fixture
def raise_in_a_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make ``adapterhub plan`` raise: what must fail on command."""

    def arrange(error: BaseException) -> None:
        @click.command("plan")
        def plan_command() -> None:
            raise error

        monkeypatch.setattr("adapterhub.commands.planning.plan_command", plan_command)

    return arrange


ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.AdapterHubError)
]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_each_error_exits_with_its_code_and_says_what_and_fix(
    kind: type[errors.AdapterHubError], raise_in_a_command, run_cli: Run
) -> None:
    raise_in_a_command(kind("rows.jsonl, line 3: not JSON", "mend that line"))
    assert run_cli("plan") == (
        kind.exit_code,
        "",
        "error: rows.jsonl, line 3: not JSON\nfix: mend that line\n",
    )


def test_a_missing_release_is_told_at_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [ADAPTERHUB, "card", tmp_path / "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == adapterhub.ManifestError.exit_code
    assert done.stdout == ""
    assert re.fullmatch(
        r"error: .*nowhere: no such folder\nfix: check the path of the release\n", done.stderr
    )


@pytest.mark.parametrize("command", ["inspect", "verify", "scan"])
def test_a_mistyped_folder_is_not_asked_of_a_hub(
    command: str, run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    for target in ("./nowhere", "runs/new/out", "out/", tmp_path / "nowhere"):
        code, out, err = run_cli(command, target)
        assert (code, out) == (3, "")
        assert err.startswith(f"error: {target}: no such folder\nfix: check the path")
    Path("a").mkdir()
    Path("a/file").touch()
    code, out, err = run_cli(command, "a/file")
    assert (code, out, err.splitlines()[0]) == (3, "", "error: a/file: is a file, not a folder")
    code, _, err = run_cli(command, "nowhere")
    assert code == 5
    assert "and there is no folder nowhere here" in err


@pytest.mark.parametrize(
    ("argv", "words", "see"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?", "adapterhub"),
        (["xyzzy"], "No such command 'xyzzy'.", "adapterhub"),
        (["--colour"], "No such option '--colour'.", "adapterhub"),
        (["inspect"], "Missing argument 'PATH|REF'.", "adapterhub inspect"),
        (["inspect", "x", "--jsn"], "No such option '--jsn'. Did you mean '--json'?", "adapterhub inspect"),
        (["inspect", "x", "--endpoint"], "'--endpoint' requires an argument.", "adapterhub inspect"),
        (["hub", "srve"], "No such command 'srve'. Did you mean 'serve'?", "adapterhub hub"),
        (["hub", "serve", "x", "--port", "http"], "Invalid value for '--port'", "adapterhub hub serve"),
        (
            ["merge", "x", "--to", "fp7", "--onto", "trained", "--out", "y"],
            "'fp7' is not",
            "adapterhub merge",
        ),
        (
            ["merge", "x", "--onto", "trained", "--out", "y"],
            "Missing option '--to'. Choose from: bf16, nf4, fp4, int8",
            "adapterhub merge",
        ),
    ],
)
def test_a_wrong_command_line_is_told_like_any_error(
    run_cli: Run, argv: list[str], words: str, see: str
) -> None:
    code, out, err = run_cli(*argv)
    assert (code, out) == (2, "")
    told, fix = err.splitlines()
    assert told.startswith("error: ")
    assert words in told
    assert fix == f"fix: see `{see} --help`"


@pytest.mark.parametrize("argv", [[], ["hub"], ["hub", "token"]])
def test_a_group_without_a_command_says_its_help(run_cli: Run, argv: list[str]) -> None:
    code, out, err = run_cli(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: adapterhub")


def test_the_version(run_cli: Run) -> None:
    assert run_cli("--version") == (0, f"adapterhub, version {adapterhub.__version__}\n", "")


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space on that disk"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "read-only"),
        (errno.EADDRINUSE, "--port"),
        (errno.EISDIR, "name a file"),
        (errno.ENOTDIR, "a part of it is a file"),
        (errno.EEXIST, "another path"),
        (errno.EIO, "ADAPTERHUB_TRACEBACK=1"),
    ],
)
def test_the_systems_errors_name_the_file_and_say_a_fix(
    raise_in_a_command, run_cli: Run, number: int, fix: str
) -> None:
    raise_in_a_command(OSError(number, os.strerror(number), "runs/out.safetensors"))
    code, out, err = run_cli("plan")
    assert (code, out) == (1, "")
    told, remedy = err.splitlines()
    assert told == f"error: runs/out.safetensors: {os.strerror(number)}"
    assert fix in remedy


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [ADAPTERHUB, "hub", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: No space left on device\nfix: free some space")
    assert "Traceback" not in done.stderr


def test_a_reader_that_went_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [ADAPTERHUB, "hub", "--help"], stdout=writing, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.slow
def test_a_reader_of_a_plan_that_went_away_is_no_error(tiny_base: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [ADAPTERHUB, "plan", tiny_base], stdout=writing, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt(raise_in_a_command, run_cli: Run, stop: BaseException) -> None:
    raise_in_a_command(stop)
    code, out, err = run_cli("plan")
    assert (code, out) == (130, "")
    assert err.lstrip("\n") == "error: interrupted\nfix: run the same command again\n"


def test_an_interrupted_training_can_be_resumed(monkeypatch: pytest.MonkeyPatch, run_cli: Run) -> None:
    @click.command("train")
    def train_command() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adapterhub.commands.training.train_command", train_command)
    code, _, err = run_cli("train")
    assert code == 130
    assert "fix: run the same command again, with --resume" in err


def test_ctrl_c_at_a_prompt_has_no_traceback(tmp_path: Path) -> None:
    command = [ADAPTERHUB, "keygen", tmp_path / "keys", "--passphrase"]
    controller, terminal = os.openpty()
    env = {name: value for name, value in os.environ.items() if name != "ADAPTERHUB_KEY_PASSWORD"}

    def listen_to_interrupts() -> None:  # a runner in the background ignores them, and its children would too
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command,
        stdin=terminal,
        stderr=terminal,
        stdout=subprocess.PIPE,
        env=env,
        preexec_fn=listen_to_interrupts,
    ) as running:
        try:
            shown = b""
            while b"Passphrase" not in shown:
                shown += os.read(controller, 1024)
            running.send_signal(signal.SIGINT)
            assert running.wait(timeout=20) == 130
        finally:
            running.kill()
    shown += os.read(controller, 4096)
    os.close(terminal)
    os.close(controller)
    assert b"error: interrupted" in shown
    assert b"Traceback" not in shown
    assert not (tmp_path / "keys").exists()


def test_a_defect_is_told_without_a_traceback(
    raise_in_a_command, run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ADAPTERHUB_TRACEBACK", raising=False)
    raise_in_a_command(ZeroDivisionError("division by zero"))
    code, out, err = run_cli("plan")
    assert (code, out) == (70, "")
    assert err.startswith("error: internal error, ZeroDivisionError: division by zero\nfix: please report it")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("division by zero"), OSError(errno.EIO, "broken"), adapterhub.RefError("a", "b")],
)
def test_a_traceback_for_who_asks(
    raise_in_a_command, run_cli: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("ADAPTERHUB_TRACEBACK", "1")
    raise_in_a_command(error)
    _, _, err = run_cli("plan")
    assert err.startswith("Traceback (most recent call last):")
    assert "\nerror: " in err


def test_the_shell_can_complete_commands() -> None:
    env = {
        **os.environ,
        "_ADAPTERHUB_COMPLETE": "bash_complete",
        "COMP_WORDS": "adapterhub ver",
        "COMP_CWORD": "1",
    }
    done = subprocess.run([ADAPTERHUB], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "plain,verify\n"


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "adapterhub", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"adapterhub, version {adapterhub.__version__}\n"
