"""Who may import whom (``[tool.importlinter]`` in pyproject.toml): the rules hold, and a breach is seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the sources in ``folder/src`` with the rules in ``folder/pyproject.toml``."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", folder / "pyproject.toml"],
        cwd=folder / "src",
        env={**os.environ, "PYTHONPATH": str(folder / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources and their rules, to break."""
    shutil.copytree(
        ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_rules_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("packaging/release.py", "from adapterhub.hub.server import names"),
        ("packaging/release.py", "from adapterhub.trainer.recipe import Recipe"),
        ("packaging/release.py", "from adapterhub import load_adapter"),
        ("packaging/release.py", "from adapterhub.commands import targets"),
        ("trainer/recipe.py", "from adapterhub.cards import card"),
        ("trainer/fast/install.py", "import adapterhub.hub.server.serve"),
        ("cards/card.py", "from adapterhub.trainer import plan"),
        ("cards/card.py", "from adapterhub.load import load_adapter"),
        ("hub/server/app.py", "from adapterhub.packaging.files import sha256_file"),
        ("hub/server/app.py", "from adapterhub.hub import refs"),
        ("hub/server/app.py", "from adapterhub.cards import card"),
        ("hub/refs.py", "from adapterhub.cards import card"),
        ("errors.py", "from adapterhub.packaging import files"),
    ],
)
def test_a_forbidden_import_is_caught(copy: Path, module: str, line: str) -> None:
    broken = copy / "src" / "adapterhub" / module
    added = f"\n\ndef breach() -> None:\n    {line}\n"
    broken.write_text(broken.read_text(encoding="utf-8") + added, encoding="utf-8")
    done = lint_imports(copy)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout
    assert f"adapterhub.{module.removesuffix('.py').replace('/', '.')}" in done.stdout


def test_a_module_without_a_place_is_caught(copy: Path) -> None:
    (copy / "src" / "adapterhub" / "utils.py").write_text("from adapterhub import load\n", encoding="utf-8")
    done = lint_imports(copy)
    assert done.returncode == 1
    assert "adapterhub.utils" in done.stdout
