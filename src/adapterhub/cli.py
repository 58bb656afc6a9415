"""The command line: finds the command, runs it, and turns every error into a message and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

import click

from adapterhub.errors import AdapterHubError, AdapterHubWarning
from adapterhub.version import __version__

# name -> module that defines it: only the command in use is imported
COMMANDS = {
    "plan": "adapterhub.commands.planning",
    "train": "adapterhub.commands.training",
    "eval": "adapterhub.commands.evidence",
    "card": "adapterhub.commands.cards",
    "site": "adapterhub.commands.site",
    "failures": "adapterhub.commands.failures",
    "arena": "adapterhub.commands.arena",
    "keygen": "adapterhub.commands.signing",
    "sign": "adapterhub.commands.signing",
    "verify": "adapterhub.commands.signing",
    "trust": "adapterhub.commands.trust",
    "scan": "adapterhub.commands.scanning",
    "convert": "adapterhub.commands.converting",
    "inspect": "adapterhub.commands.releases",
    "merge": "adapterhub.commands.merging",
    "requantize": "adapterhub.commands.merging",
    "retarget": "adapterhub.commands.retargeting",
    "fidelity": "adapterhub.commands.fidelity",
    "export": "adapterhub.commands.exporting",
    "diff": "adapterhub.commands.differences",
    "log": "adapterhub.commands.versions",
    "bump": "adapterhub.commands.versions",
    "push": "adapterhub.commands.sync",
    "pull": "adapterhub.commands.sync",
    "list": "adapterhub.commands.catalogue",
    "info": "adapterhub.commands.catalogue",
    "search": "adapterhub.commands.catalogue",
    "repo": "adapterhub.commands.catalogue",
    "lock": "adapterhub.commands.locking",
    "hub": "adapterhub.commands.server",
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM: whatever tidies up after an interrupt does so after this too."""


class LazyGroup(click.Group):
    """A click group that imports a command's module only when that command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        attribute = f"{cmd_name}_command"
        command: click.Command = getattr(import_module(COMMANDS[cmd_name]), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="adapterhub")
def cli() -> None:
    """Train QLoRA adapters on one GPU; sign, version, publish, pull, load and merge them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (the table is in ``adapterhub.errors``).

    Data goes to stdout, words to stderr. An interrupt exits 130, SIGTERM 143. Set ``ADAPTERHUB_TRACEBACK=1``
    to see where an error came from.
    """
    if "_ADAPTERHUB_COMPLETE" in os.environ:
        cli.main(prog_name="adapterhub")  # answers the shell that completes a command line, and exits
    with warnings.catch_warnings(), _tidying_when_terminated():
        _tell_warnings()
        return _run(list(sys.argv[1:] if argv is None else argv))


@contextmanager
def _tidying_when_terminated() -> Iterator[None]:
    """A SIGTERM ends a command as Ctrl-C does, unless whoever runs it handles or ignores the signal."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _tell_warnings() -> None:
    """Print our own warnings as plain words on stderr, each time."""
    if not sys.warnoptions:  # libraries' advice to programmers is none to who types a command
        warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("always", AdapterHubWarning)
    show = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, AdapterHubWarning):
            click.echo(f"warning: {message}", err=True)
        else:
            show(message, category, *where, **more)

    warnings.showwarning = tell


def _run(arguments: list[str]) -> int:
    try:
        with cli.make_context("adapterhub", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        help_wanted.show()
        return help_wanted.exit_code
    except click.UsageError as err:
        named = [it for it in arguments[:1] if it in COMMANDS]  # click gives some errors no context
        command = err.ctx.command_path if err.ctx else " ".join(["adapterhub", *named])
        told = " ".join(err.format_message().split())  # click lists choices on lines of their own
        return _fail(told, f"see `{command} --help`", err.exit_code)
    except (KeyboardInterrupt, click.Abort) as err:
        click.echo(err=True)  # ends the line on which the terminal shows ^C
        is_train = arguments[:1] == ["train"]
        again = "run the same command again" + (
            ", with --resume from its last checkpoint" if is_train else ""
        )
        what, code = ("terminated", 143) if isinstance(err, _Terminated) else ("interrupted", 130)
        return _fail(what, again, code)
    except BrokenPipeError:
        # The reader of our stdout went away (`adapterhub … | head`): not our error, and no traceback at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except AdapterHubError as err:
        _traceback_if_asked()
        return _fail(err.what, err.fix, err.exit_code)
    except OSError as err:
        _traceback_if_asked()
        return _fail(*_explain_os_error(err), 1)
    except Exception as err:
        _traceback_if_asked()
        what = f"internal error, {type(err).__name__}: {err}"
        return _fail(what, "please report it with what ADAPTERHUB_TRACEBACK=1 prints", 70)
    return 0


def _fail(what: str, fix: str, exit_code: int) -> int:
    click.echo(f"error: {what}", err=True)
    click.echo(f"fix: {fix}", err=True)
    return exit_code


def _traceback_if_asked() -> None:
    if os.environ.get("ADAPTERHUB_TRACEBACK"):
        import traceback

        traceback.print_exc()


def _explain_os_error(err: OSError) -> tuple[str, str]:
    """What happened and what to do, for the operating system's own errors."""
    where = f"{err.filename}: " if err.filename else ""
    what = f"{where}{err.strerror or err}"
    fixes = {
        errno.ENOSPC: "free some space on that disk and run it again; nothing half-written is kept",
        errno.EDQUOT: "free some of your quota on that disk and run the same command again",
        errno.EACCES: "check who owns it and its permissions (ls -l)",
        errno.EPERM: "check who owns it and its permissions (ls -l)",
        errno.EROFS: "write to a file system that is not read-only",
        errno.ENOENT: "check the path",
        errno.EISDIR: "name a file, not a folder",
        errno.ENOTDIR: "check the path: a part of it is a file",
        errno.EEXIST: "name another path, or remove what is there",
        errno.EADDRINUSE: "another program listens there: stop it or choose another --port",
    }
    return what, fixes.get(
        err.errno or 0, "see the message above; ADAPTERHUB_TRACEBACK=1 shows where it came from"
    )
