"""``adapterhub merge`` at the shell."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]


def test_a_release_onto_trained(tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli) -> None:
    out = tmp_path / "out"
    args = (
        "merge",
        tiny_release,
        "--to",
        "bf16",
        "--onto",
        "trained",
        "--base",
        tiny_base,
        "--out",
        out,
        "--json",
    )
    code, printed, err = run_cli(*args)
    assert code == 0
    assert "does not say" not in err
    result = json.loads(printed)
    assert (result["to"], result["onto"], result["merged"], result["requantized"]) == (
        "bf16",
        "trained",
        14,
        14,
    )
    assert result["quantization"]["type"] == "nf4"
    assert result["release"]["digest"] == Release.open(out).digest
    code, printed, err = run_cli(*args)
    assert (code, printed) == (3, "")
    assert "exists already" in err


def test_a_plain_adapter_needs_a_base_and_says_what_it_assumes(
    tiny_adapter: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    args = ("merge", tiny_adapter, "--to", "bf16", "--onto", "trained", "--out", tmp_path / "out")
    code, _printed, err = run_cli(*args)
    assert code == 3
    assert "--base" in err
    code, printed, err = run_cli(*args, "--base", tiny_base)
    assert code == 0
    assert "taking NF4, double, blocks of 64" in err
    assert "merged onto  trained, 14 of 20 tensors" in printed


def test_another_base_exits_3_and_leaves_nothing(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / "config.json").write_text("{}")
    args = (
        "merge",
        tiny_release,
        "--to",
        "bf16",
        "--onto",
        "original",
        "--base",
        other,
        "--out",
        tmp_path / "out",
    )
    code, printed, err = run_cli(*args)
    assert (code, printed) == (3, "")
    assert "is not tiny-llama as trained on: config.json differs (sha256 44136fa355b3…, expected" in err
    assert "--allow-base-mismatch REASON" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_neither_transformers_nor_peft_is_imported(
    tiny_release: Path, tiny_base: Path, tmp_path: Path
) -> None:
    script = (
        "import sys\n"
        "from adapterhub.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "assert not {'transformers', 'peft', 'datasets'} & sys.modules.keys(), sorted(sys.modules)\n"
        "raise SystemExit(code)\n"
    )
    args = (
        "merge",
        tiny_release,
        "--to",
        "bf16",
        "--onto",
        "original",
        "--base",
        tiny_base,
        "--out",
        tmp_path / "out",
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_light_commands_import_no_torch(tiny_release: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from adapterhub.cli import main\n"
        "release, keys = sys.argv[1:]\n"
        "assert main(['keygen', keys]) == 0\n"
        "assert main(['sign', release, '--key', keys + '/adapterhub.key']) == 0\n"
        "assert main(['verify', release]) == 0\n"
        "assert main(['inspect', release, '--json']) == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & sys.modules.keys()\n"
    )
    args = [sys.executable, "-c", script, str(tiny_release), str(tmp_path / "keys")]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
