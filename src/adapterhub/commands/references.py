"""What a merge is made of, and the live model it is measured against: base in 4 bits, adapters attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.commands.comparing import Side, load_side, measure_kept
from adapterhub.commands.judging import Judge, Measuring
from adapterhub.packaging.manifest import MANIFEST_NAME
from adapterhub.packaging.temporary import scratch_beside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adapterhub.packaging.manifest import BaseLock, BaseMismatch, Quantization
    from adapterhub.packaging.merge import Combination, Onto
    from adapterhub.packaging.release import Release


@dataclass(frozen=True)
class Ingredients:
    """The folders that a merge is made of."""

    adapter: Path
    base: Path
    combination: Combination | None
    allow_base_mismatch: str | None
    """Why another base than the one trained on will do."""

    @property
    def adapters(self) -> list[Path]:
        """All of them, the first first."""
        return [self.adapter, *(folder for folder, _weight in self._others)]

    @property
    def are_plain(self) -> bool:
        """Whether no adapter is a release, so that nobody says how its base was quantized."""
        return not any((folder / MANIFEST_NAME).is_file() for folder in self.adapters)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's, where it has one, else the base's: as the result will have it."""
        from adapterhub.trainer.model import load_tokenizer

        names = ("tokenizer.json", "tokenizer_config.json")
        own = any((self.adapter / name).is_file() for name in names)
        return load_tokenizer(self.adapter if own else self.base)

    @contextmanager
    def judging(self, measuring: Measuring, out: Path) -> Iterator[Callable[[Onto], Judge]]:
        """What gives a judge of results onto a target; ``out`` is where scratch files may lie beside.

        Raises ReleaseError when the adapters saw differently quantized weights: no model has both.
        """
        self._trained_in(self._locks())
        with scratch_beside(out) if self.combination else nullcontext() as together:

            def judge(onto: Onto) -> Judge:
                before = self.base if onto == "original" else None
                return Judge(
                    measuring,
                    lambda mismatches: self._load_live(together, mismatches),
                    lambda live, merged: measure_kept(live.folder, live.model, before, merged),
                )

            yield judge

    def _load_live(self, together: Path | None, mismatches: list[BaseMismatch]) -> Side:
        """The live model; ``together`` is a folder for what several adapters are as one."""
        from adapterhub.load import find_base, load_plain

        if self.combination is None and not self.are_plain:
            return load_side(str(self.adapter), str(self.base), None, self.allow_base_mismatch, mismatches)
        locks = self._locks()
        base = find_base(
            next(iter(locks.values()), None),
            self.base,
            allow_mismatch=self.allow_base_mismatch,
            note=mismatches.append,
        )
        folder = self._as_one(together)
        return Side(self._name(), folder, None, load_plain(folder, base, self._trained_in(locks)), None)

    def _as_one(self, together: Path | None) -> Path:
        from adapterhub.packaging.adapter import CONFIG_NAME
        from adapterhub.packaging.combination import CombinedAdapter, write_combined
        from adapterhub.packaging.merge import read_adapters

        combined = read_adapters(self.adapter, self.combination)
        if not isinstance(combined, CombinedAdapter):
            return self.adapter
        assert together is not None
        if not (together / CONFIG_NAME).is_file():
            write_combined(combined, together)
        return together

    def _name(self) -> str:
        combination = self.combination
        if combination is None:
            return self.adapter.resolve().name
        weights = [combination.weight, *(weight for _folder, weight in self._others)]
        terms = [
            f"{weight:g} × {_ref(folder)}" for folder, weight in zip(self.adapters, weights, strict=True)
        ]
        return f"{' + '.join(terms)} ({combination.combine})"

    @property
    def _others(self) -> list[tuple[Path, float]]:
        return list(self.combination.others) if self.combination else []

    def _locks(self) -> dict[Path, BaseLock]:
        from adapterhub.packaging.merge import base_locks

        return base_locks({folder: _open(folder) for folder in self.adapters})

    def _trained_in(self, locks: dict[Path, BaseLock]) -> Quantization | None:
        from adapterhub.packaging.merge import trained_in

        return trained_in(locks)


def _open(folder: Path) -> Release | None:
    from adapterhub.packaging.release import Release

    return Release.open(folder) if (folder / MANIFEST_NAME).is_file() else None


def _ref(folder: Path) -> str:
    release = _open(folder)
    if release is None:
        return folder.resolve().name
    return f"{release.manifest.name}@{release.manifest.version}"
