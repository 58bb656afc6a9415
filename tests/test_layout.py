"""The root holds links named like the rooms; the one named ``packaging`` must shadow nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cards", "hub", "packaging", "trainer")


@pytest.mark.parametrize("room", ROOMS)
def test_the_root_shows_each_room(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink()
    assert link.readlink() == Path("src/adapterhub") / room
    assert not list(link.rglob("__init__.py"))


def test_at_the_root_packaging_is_pypis() -> None:
    program = (
        "import packaging, packaging.version, transformers, adapterhub.packaging.release as release;"
        "print(packaging.__file__); print(release.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pypis, ours = map(Path, done.stdout.split())
    assert pypis.parts[-3:] == ("site-packages", "packaging", "__init__.py")
    assert ours == ROOT / "src/adapterhub/packaging/release.py"
