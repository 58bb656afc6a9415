"""What a pickle would import if somebody opened it, read from its opcodes: nothing is ever unpickled."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
_MAX_PICKLE_BYTES = 64 * 1024 * 1024
_OLD_TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_OLD_TORCH_PICKLES = 5  # magic, protocol, system, object, keys of the storages; then the bare numbers
_ZIP_MAGIC = b"PK\x03\x04"
_CALLS = (
    "os", "posix", "nt", "subprocess", "sys", "builtins", "importlib", "runpy", "socket",
    "shutil", "pty", "commands", "webbrowser", "ctypes", "code", "operator", "pickle", "_pickle", "requests",
    "urllib", "pip", "bdb", "pdb", "timeit", "torch.hub", "torch._dynamo", "numpy.testing",
)  # fmt: skip
_HARMLESS_BUILTINS = {"builtins.set", "builtins.dict", "builtins.list", "builtins.getattr", "builtins.slice",
                      "builtins.bytearray", "builtins.complex", "builtins.object"}  # fmt: skip


@dataclass(frozen=True)
class Pickle:
    """A pickle, as far as its opcodes tell."""

    imports: tuple[str, ...]
    """``module.name`` of everything it would look up, sorted."""
    readable: bool
    """False when the opcodes end early or make no sense; ``imports`` is then only a beginning."""

    @property
    def calls(self) -> tuple[str, ...]:
        """Those of ``imports`` with which an opened pickle can do as it likes."""
        return tuple(name for name in self.imports if _can_act(name))


def looks_like_pickle(path: Path) -> bool:
    """Whether the first bytes are those of a pickle (protocol 2 and later) or of torch's archive of one."""
    with path.open("rb") as file:
        start = file.read(4)
    return (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or (
        start == _ZIP_MAGIC and bool(_members(path))
    )


def read_pickle(path: Path) -> Pickle:
    """Read the opcodes of a pickle, or of those in torch's archive; at most 64 MiB of each are looked at."""
    names: set[str] = set()
    readable = True
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in _members(path):
                    with archive.open(member) as file:
                        readable &= _collect(file, names)
        else:
            with path.open("rb") as file:
                readable = _collect(file, names)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
        readable = False
    return Pickle(tuple(sorted(names)), readable)


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name for name in archive.namelist() if name.endswith(".pkl")]
    except (OSError, zipfile.BadZipFile, ValueError):
        return []


def _collect(file: IO[bytes], names: set[str]) -> bool:
    """Add what one pickle imports to ``names``; whether its opcodes could be read to the end.

    Of torch's old format, which is several pickles in a row, all are read.
    """
    data = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    rows = _OLD_TORCH_PICKLES if _OLD_TORCH_MAGIC in data.getvalue()[:32] else 1
    try:
        for _row in range(rows):
            for name in _imports(data):
                names.add(name)
    except Exception:  # pickletools raises whatever a malformed opcode makes it raise
        return False
    return True


def _imports(data: IO[bytes]) -> Iterator[str]:
    texts: list[str] = []  # what STACK_GLOBAL may refer to: the last two texts pushed
    memo: dict[int, str] = {}
    for opcode, argument, _position in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".").replace("__builtin__.", "builtins.")  # protocol 2's name
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else ""
        elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(str(argument))] = texts[-1] if texts else ""
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            texts.append(memo.get(int(str(argument)), "?"))
        elif isinstance(argument, str):
            texts.append(argument)


def _can_act(name: str) -> bool:
    return name not in _HARMLESS_BUILTINS and any(
        name == module or name.startswith(f"{module}.") for module in _CALLS
    )
