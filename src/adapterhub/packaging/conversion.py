"""An adapter's pickle made into safetensors, by a process that may do nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import ReleaseError
from adapterhub.packaging import unpickling
from adapterhub.packaging.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from adapterhub.packaging.files import sha256_file, staged_folder
from adapterhub.packaging.scan.findings import quote
from adapterhub.packaging.scan.pickles import looks_like_pickle, read_pickle

# What else of a PEFT folder loaders read; nothing that could hold code is carried along.
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "README.md",
)  # fmt: skip
_WALL_SECONDS = 600
_SPARE_BYTES = 256 * 1024 * 1024
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG")  # no token, no key, no proxy


@dataclass(frozen=True)
class Converted:
    """What a conversion made."""

    out: Path
    """A PEFT folder."""
    tensors: int
    size: int
    """Bytes of adapter_model.safetensors."""
    sha256: str
    """Of adapter_model.safetensors."""


def convert_pickle(pickle: Path, out: Path) -> Converted:
    """Turn the tensors of a pickle (``adapter_model.bin``) into safetensors, in a new PEFT folder ``out``.

    The adapter_config.json beside it is copied, and the tokenizer's files. The pickle's opcodes are read
    first, and one that would call something is refused unopened. Then a process of its own opens it, which
    builds nothing but tensors (``torch.load(weights_only=True)``) and has limits of time (300 s of
    processor), memory (three times the file, and 256 MiB) and output; it sees none of this one's tokens.

    Raises ReleaseError, naming what stands in the way, for anything but a flat pickle of plain tensors, when
    no adapter_config.json lies beside it or does not fit, and when ``out`` exists; OSError for a full disk.
    Nothing is left at ``out`` then.
    """
    _check_pickle(pickle)
    config = pickle.with_name(CONFIG_NAME)
    if not config.is_file():
        raise ReleaseError(
            f"there is no {CONFIG_NAME} beside {pickle}, which says what its tensors mean",
            "put the one that came with it there",
        )
    with staged_folder(out) as staging:
        count = _open_apart(pickle, staging / WEIGHTS_NAME)
        for name in (CONFIG_NAME, *_COMPANIONS):
            if pickle.with_name(name).is_file():
                shutil.copyfile(pickle.with_name(name), staging / name)
        try:
            read_adapter(staging)
        except ReleaseError as err:
            what = err.what.replace(str(staging / WEIGHTS_NAME), str(pickle))
            what = what.replace(str(staging), str(pickle.parent))
            raise ReleaseError(what, err.fix) from err
    weights = out / WEIGHTS_NAME
    return Converted(out, count, weights.stat().st_size, sha256_file(weights))


def _check_pickle(path: Path) -> None:
    """Refuse, by its opcodes and its archive's listing, what must not be opened at all."""
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "no such file"
        raise ReleaseError(f"{path}: {kind}", "name an adapter_model.bin")
    if path.suffix == ".safetensors":
        raise ReleaseError(f"{path} is in safetensors already", "use it as it is")
    found = read_pickle(path)
    if found.calls:
        raise ReleaseError(
            f"{path} is a pickle that calls {quote(', '.join(found.calls[:4]), 160)} when it is opened: "
            "it was not opened",
            "do not open it; tell whoever hosts it",
        )
    if not found.readable or not (looks_like_pickle(path) or found.imports):
        raise ReleaseError(
            f"{path} is no pickle of tensors that torch wrote", "take it from its source again"
        )
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(it.compress_type != zipfile.ZIP_STORED for it in members) or (
            sum(it.file_size for it in members) > path.stat().st_size
        ):
            raise ReleaseError(
                f"{path} is an archive that grows when it is opened; torch writes none like that",
                "do not open it; take it from its source again",
            )


def _open_apart(pickle: Path, target: Path) -> int:
    """Have the other process write ``target``; return how many tensors it holds."""
    size = pickle.stat().st_size
    limits = (3 * size + _SPARE_BYTES, size + _SPARE_BYTES)
    command = [sys.executable, "-I", "-S", "-B", unpickling.__file__, str(pickle.resolve()), str(target)]
    command += [*map(str, limits), *(path for path in sys.path if path)]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    fix = "ask its maker for adapter_model.safetensors, which peft writes by default"
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_WALL_SECONDS,
            check=False,
            env=environment,
        )
        answer = json.loads(run.stdout) if run.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        answer = None
    if answer is None:
        raise ReleaseError(f"{pickle} could not be opened within the limits of time and memory", fix)
    if "error" in answer:
        raise ReleaseError(f"{pickle} was not converted: {quote(answer['error'], 300)}", fix)
    return int(answer["tensors"])
