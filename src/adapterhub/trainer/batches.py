"""Which rows each process sees in which micro-batch: the same steps, however many processes share them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from adapterhub.trainer.packing import PackedRow
from adapterhub.trainer.template import IGNORED

# Stands where a pass ends inside a step: no token of it carries loss.
BLANK = PackedRow([0, 0], [IGNORED, IGNORED], [0, 1])


class StepBatches(Sampler[list[int]]):
    """One process's micro-batches, as row numbers; the number after the last row stands for ``BLANK``.

    Each pass draws one order for all processes from ``seed`` and the pass. Every ``batch_size`` rows are a
    step; its micro-batches go to the processes in turn, and all of them get equally many. So a step holds the
    same rows whatever ``processes`` and ``micro_batch`` are, and a run may go on with other ones.
    """

    def __init__(
        self, rows: int, batch_size: int, micro_batch: int, *, seed: int, process: int, processes: int
    ) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._micro_batch = micro_batch
        self._seed = seed
        self._process = process
        self._processes = processes
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of pass ``epoch`` from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        steps = -(-self._rows // self._batch_size)
        return steps * (self._batch_size // (self._micro_batch * self._processes))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(self._rows, generator=generator).tolist()
        size = self._micro_batch
        for start in range(0, self._rows, self._batch_size):
            step = order[start : start + self._batch_size]
            step += [self._rows] * (self._batch_size - len(step))
            for at in range(self._process * size, self._batch_size, self._processes * size):
                yield step[at : at + size]


class StepLoader(DataLoader[PackedRow]):
    """Batches of ``rows`` in the order of ``batches``."""

    def __init__(
        self,
        rows: Sequence[PackedRow],
        batches: StepBatches,
        collate: Callable[[Sequence[PackedRow]], dict[str, Any]],
        *,
        pin_memory: bool,
    ) -> None:
        dataset: Any = [*rows, BLANK]
        super().__init__(dataset, batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory)
        self._batches = batches

    def set_epoch(self, epoch: int) -> None:
        """What transformers.Trainer calls at the start of each pass."""
        self._batches.set_epoch(epoch)
