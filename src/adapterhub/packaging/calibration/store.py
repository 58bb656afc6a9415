"""The chosen codes of finished layers, on the disk: memory holds one layer's, and a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.packaging.evidence import RoundingError
from adapterhub.packaging.files import fsync_folder
from adapterhub.packaging.layout import Quantized4bit

if TYPE_CHECKING:
    import torch

_KEY, _ERRORS = "key", "errors"
_CODES, _SCALES = ".codes", ".scales"


class CodeStore:
    """A folder with a safetensors file for each finished decoder layer."""

    def __init__(self, folder: Path, key: str, by_code: torch.Tensor) -> None:
        """``key`` says what is made of what: files of another are removed. ``by_code``: the codes' values."""
        self._folder, self._key, self._by_code = folder, key, by_code
        self._files: dict[str, Path] = {}
        self.errors: dict[int, list[RoundingError]] = {}
        """Of each finished layer."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            if not self._open(path):
                path.unlink()

    @property
    def names(self) -> frozenset[str]:
        """The weights that are here."""
        return frozenset(self._files)

    def _open(self, path: Path) -> bool:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                noted, names = file.metadata() or {}, list(file.keys())
        except (SafetensorError, OSError):
            return False
        if noted.get(_KEY) != self._key:
            return False
        self._note(path, [RoundingError(**error) for error in json.loads(noted[_ERRORS])], names)
        return True

    def _note(self, path: Path, errors: list[RoundingError], names: Sequence[str]) -> None:
        self._files |= {name.removesuffix(_CODES): path for name in names if name.endswith(_CODES)}
        self.errors[int(path.stem)] = errors

    def save(self, layer: int, weights: Mapping[str, Quantized4bit], errors: Sequence[RoundingError]) -> None:
        """Keep a layer's weights by their names in the checkpoint."""
        from safetensors.torch import save_file

        tensors = {f"{name}{_CODES}": weight.codes.cpu() for name, weight in weights.items()}
        tensors |= {f"{name}{_SCALES}": weight.scales.cpu() for name, weight in weights.items()}
        path = self._folder / f"{layer}.safetensors"
        unfinished = path.with_suffix(".tmp")
        noted = {_KEY: self._key, _ERRORS: json.dumps([error.model_dump() for error in errors])}
        save_file(tensors, unfinished, noted)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
        fsync_folder(self._folder)
        self._note(path, list(errors), list(tensors))

    def load(self, name: str) -> Quantized4bit:
        """The codes and scales of a weight that was saved, on the CPU."""
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as file:
            codes, scales = file.get_tensor(name + _CODES), file.get_tensor(name + _SCALES)
        return Quantized4bit(codes, scales, self._by_code.cpu())
