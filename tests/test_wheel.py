"""The distribution: built as publishers build it, and installed where nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # installs torch and all that it needs

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, **options: object) -> str:
    """Run a command away from the checkout's own settings; its stdout. Fails with its stderr."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of what git tracks, and the wheel made from that sdist."""
    source = tmp_path_factory.mktemp("source")
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, tracked):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, source)
    return out


@pytest.fixture(scope="session")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a fresh environment with the wheel, its plain dependencies, and nothing else."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=True)
    (wheel,) = dist.glob("*.whl")
    scripts = environment / "bin"
    run(scripts / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    return scripts


def test_the_wheel_holds_the_whole_package(dist: Path) -> None:
    (wheel,) = dist.glob("adapterhub-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "src/adapterhub"
    expected = {
        f"adapterhub/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and path.suffix in (".py", ".j2", ".css", ".js", ".typed")
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    for room in (
        "cards/templates/page.css",
        "hub/server/app.py",
        "packaging/release.py",
        "trainer/recipe.py",
        "py.typed",
    ):
        assert f"adapterhub/{room}" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_builds_and_holds_the_licence(dist: Path) -> None:
    (sdist,) = dist.glob("adapterhub-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "src/adapterhub/packaging/release.py"} <= names


def test_it_works_where_nothing_else_is(
    installed: Path, tiny_release: Path, tiny_base: Path, tmp_path: Path
) -> None:
    assert run(installed / "adapterhub", "--help", cwd=tmp_path).startswith("Usage: adapterhub")
    assert "tiny-orders 0.1.0" in run(installed / "adapterhub", "inspect", tiny_release, cwd=tmp_path)
    run(installed / "adapterhub", "keygen", "keys", cwd=tmp_path)
    run(installed / "adapterhub", "card", tiny_release, cwd=tmp_path)
    run(installed / "adapterhub", "sign", tiny_release, "--key", "keys/adapterhub.key", cwd=tmp_path)
    run(installed / "adapterhub", "verify", tiny_release, "--key", "keys/adapterhub.pub", cwd=tmp_path)
    program = (
        "import sys, adapterhub\n"
        "model, tokenizer = adapterhub.load_adapter(sys.argv[1], base=sys.argv[2])\n"
        "print(adapterhub.__file__, type(model).__name__)"
    )
    loaded = run(installed / "python", "-c", program, tiny_release, tiny_base, cwd=tmp_path)
    assert loaded.startswith(str(installed.parent))
    assert loaded.split()[-1].startswith("Peft")


def test_it_says_which_extra_is_missing(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "adapterhub", "hub", "serve", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert "fix: pip install 'adapterhub[serve]'" in done.stderr
