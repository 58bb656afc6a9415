"""What must start fast imports none of the heavy libraries, and every command can say its help."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from adapterhub.cli import COMMANDS, cli

HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate")
REPORT = f"import sys; print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"


def run_python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_after(statement: str) -> list[str]:
    """The heavy libraries that a fresh interpreter has imported after ``statement``."""
    output = run_python(f"{statement}\n{REPORT}")
    return output.rpartition("heavy:")[2].split()


@pytest.mark.parametrize("name", HEAVY)
def test_the_report_would_see_it(name: str) -> None:
    """The check can fail: a module of that name in sys.modules is reported."""
    assert heavy_after(f"import sys; sys.modules[{name!r}] = sys") == [name]


@pytest.mark.parametrize(
    "statement",
    [
        "import adapterhub",
        "import adapterhub; adapterhub.Release, adapterhub.Recipe, adapterhub.load_adapter",
        "import adapterhub.commands.sync, adapterhub.hub.refs, adapterhub.packaging.signing",
    ],
)
def test_imports_are_light(statement: str) -> None:
    assert heavy_after(statement) == []


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in COMMANDS)], ids=lambda path: " ".join(path) or "adapterhub"
)
def test_help_is_light(command: tuple[str, ...]) -> None:
    assert heavy_after(f"from adapterhub.cli import main; assert main({[*command, '--help']!r}) == 0") == []


@pytest.mark.parametrize("command", ["verify", "card", "inspect"])
def test_commands_that_read_a_release_are_light(command: str, tiny_release: object) -> None:
    """They do their work, or refuse (the release is unsigned), without the libraries that train."""
    argv = [command, str(tiny_release)]
    assert heavy_after(f"from adapterhub.cli import main; assert main({argv!r}) in (0, 4)") == []


def every_command(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from every_command(command.get_command(context, name), (*path, name))


def test_every_command_says_its_help(run_cli) -> None:
    paths = list(every_command(cli))
    assert len(paths) > len(COMMANDS)
    for path in paths:
        code, out, err = run_cli(*path, "--help")
        assert (code, err) == (0, ""), path
        assert out.startswith(f"Usage: {' '.join(('adapterhub', *path))} [OPTIONS]"), path


def test_every_option_says_what_it_is_for() -> None:
    for path in every_command(cli):
        command: click.Command = cli
        for name in path:
            command = command.get_command(click.Context(command), name)
        bare = [
            option.name for option in command.params if isinstance(option, click.Option) and not option.help
        ]
        assert bare == [], f"{' '.join(path)}: no help for {bare}"
