"""The sums of a merge, piece by piece: rows put in, s·B·A added, lengths restored, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import Adapter, LoraPair
from adapterhub.packaging.checkpoint import Checkpoint
from adapterhub.packaging.combination import CombinedAdapter, CombinedPair
from adapterhub.packaging.layout import (
    BLOCK,
    PLAIN_DTYPE,
    Layout,
    Quantized4bit,
    Storage,
    Stored,
    encode_4bit,
    encode_int8,
)
from adapterhub.packaging.manifest import Quantization
from adapterhub.packaging.quantized import quantized_names, through_4bit_
from adapterhub.packaging.shards import Change, Piece
from adapterhub.packaging.tensors import DTYPE_BYTES, FLOATS, TensorEntry, TensorFile, read_bytes, read_tensor
from adapterhub.packaging.updates import HEAD, Update, Updates, match_updates

if TYPE_CHECKING:
    import torch

    LoadPair = Callable[[str], tuple[torch.Tensor, torch.Tensor]]
    Finish = Callable[[torch.Tensor, int], None]

# Bytes changed at a time: large enough to make calls cheap, small enough that a dozen in flight stay under
# 100 MB.
PIECE_BYTES = 4 * 1024 * 1024
# Numbers of the float32 product B·A that are made at a time: it is still in the core's own cache when it is
# added, and the allocator hands the same memory out again (four times as many take 2.5 times as long).
_PRODUCT_ITEMS = 1 << 17
_PAIRS_KEPT = 4


@dataclass(frozen=True)
class Target:
    """One tensor of the new checkpoint."""

    source: TensorEntry | None
    """The shard's tensor that it takes the place of; None for one that the base has not."""
    origin: TensorFile | None
    """The file that it begins in, when that is not the shard's own place."""
    entry: TensorEntry
    """What it begins as, under the name that it will have."""
    stored: list[Stored]
    """What stands for it in the new shard, in order."""


@dataclass(frozen=True)
class SumPlan:
    """Which tensors of the checkpoint change, and how."""

    adapter: Adapter | CombinedAdapter | None
    """None: nothing is added, the weights are stored otherwise."""
    updates: Updates
    quantized: frozenset[str]
    """The weights that go through 4 bits first."""
    quantization: Quantization | None
    layout: Layout
    """What the results are stored as."""
    device: str = "cpu"
    """Where it is computed, as torch names it."""
    chosen: Callable[[str], Quantized4bit] | None = None
    """Codes that were chosen beforehand, by the weight's name; None: each number goes to the nearest."""

    @property
    def pairs(self) -> dict[str, LoraPair | CombinedPair]:
        """The factors by the name of the weight that they are added to."""
        return {name: update.pair for name, update in self.updates.by_name.items() if update.pair is not None}

    def targets(self, shard: TensorFile) -> list[Target]:
        """The tensors of one new shard, in order; a head that is untied follows the embeddings."""
        begun: list[tuple[TensorEntry | None, TensorFile | None, TensorEntry]] = []
        for entry in shard.entries:
            begun.append(self._begin(entry, entry.name))
            if entry.name == self.updates.untied_from:
                begun.append((None, *self._begin(entry, HEAD)[1:]))
        stored = self.layout.place(self._as_grown(entry) for _source, _origin, entry in begun)
        return [Target(*parts, stored=names) for parts, names in zip(begun, stored, strict=True)]

    def _as_grown(self, entry: TensorEntry) -> TensorEntry:
        """``entry`` with the shape that it has once new tokens' rows follow its own."""
        update = self.updates.by_name.get(entry.name)
        grown = update.grown if update else 0
        return replace(entry, shape=(entry.shape[0] + grown, *entry.shape[1:])) if grown else entry

    def _begin(
        self, source: TensorEntry, name: str
    ) -> tuple[TensorEntry | None, TensorFile | None, TensorEntry]:
        update = self.updates.by_name.get(name)
        if update is None or update.origin is None:
            return source, None, source
        file, entry = update.origin
        return source, file, replace(entry, name=name)

    def pieces(self, shard: TensorFile) -> list[Piece]:
        """The pieces of one shard in order, covering every tensor."""
        load = lru_cache(maxsize=_PAIRS_KEPT)(self._load_pair) if self.adapter else None
        pieces: list[Piece] = []
        end = shard.data_start
        for target in self.targets(shard):
            made = self._pieces_of(target, load)
            if target.source is not None:
                end = target.source.offset + target.source.size
            if target.origin is not None:
                if target.source is not None:
                    pieces += _cut(target.source, 1, lambda _first: _drop)
                made = [Piece(end, 0, partial(_elsewhere, target.origin, piece)) for piece in made]
            pieces += made
            update = self.updates.by_name.get(target.entry.name)
            if update is not None and update.grown:
                assert isinstance(self.adapter, Adapter)
                pieces.append(Piece(end, 0, partial(_new_rows, self.adapter, update)))
        return pieces

    def sums_of(self, shard: TensorFile) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
        """The tensors of one new shard by name, each computed when it is called: float32, unrounded.

        Raises ReleaseError, when called, for one that is not of floats.
        """
        load = lru_cache(maxsize=_PAIRS_KEPT)(self._load_pair) if self.adapter else None
        for target in self.targets(shard):
            file = target.origin or shard
            yield target.entry.name, partial(self._sum, target, file, load)

    def _sum(self, target: Target, file: TensorFile, load: LoadPair | None) -> torch.Tensor:
        import torch

        entry = target.entry
        if len(entry.shape) != 2 or entry.dtype not in FLOATS:
            return read_tensor(file, entry).to(self.device, torch.float32)
        view = memoryview(read_bytes(file, entry.offset, entry.size))
        finish, through = self._finish(entry.name, load), self._through(target)
        return torch.cat(list(_summed_rows(entry, through, finish, self.device, view)))

    def _finish(self, name: str, load: LoadPair | None) -> Finish | None:
        """What the adapter does to a tensor's numbers; None when nothing."""
        update = self.updates.by_name.get(name)
        if update is None or not update.computes:
            return None
        assert self.adapter is not None
        assert load is not None
        return partial(_finish, self.adapter, update, load)

    def _through(self, target: Target) -> Quantization | None:
        return self.quantization if target.entry.name in self.quantized and target.origin is None else None

    def _load_pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.adapter is not None
        a, b = self.adapter.load_pair(module)
        return a.to(self.device), b.to(self.device)

    def _pieces_of(self, target: Target, load: LoadPair | None) -> list[Piece]:
        entry, name = target.entry, target.entry.name
        update = self.updates.by_name.get(name)
        finish, through = self._finish(name, load), self._through(target)
        if name in self.layout.quantized and self.chosen is not None:
            return [Piece(entry.offset, entry.size, partial(_chosen, self.chosen, entry, target.stored))]
        if name in self.layout.quantized:
            store = _stored_in_int8 if self.layout.storage == "int8" else _stored_in_4bit
            return [
                Piece(
                    entry.offset,
                    entry.size,
                    partial(store, entry, target.stored, through, finish, self.device),
                )
            ]
        if through is not None:
            return [
                Piece(entry.offset, entry.size, partial(_requantized, entry, through, finish, self.device))
            ]
        if finish is not None:
            assert update is not None
            if update.magnitude is not None and update.pair is not None and update.pair.transposed:
                return [Piece(entry.offset, entry.size, partial(_added, entry, 0, finish, self.device))]
            return _cut(
                entry, entry.shape[1], lambda first: partial(_added, entry, first, finish, self.device)
            )
        if entry.dtype in FLOATS and entry.dtype != PLAIN_DTYPE:
            return _cut(entry, 1, lambda _first: partial(_rounded, entry.dtype))
        return _cut(entry, 1, lambda _first: None)


def plan_sums(
    adapter: Adapter | CombinedAdapter | None,
    checkpoint: Checkpoint,
    quantization: Quantization | None,
    storage: Storage = "bf16",
    device: str = "cpu",
) -> SumPlan:
    """Match every tensor of the adapter with one of the base.

    ``quantization`` is what the base's linear layers went through, None to add to them as they are;
    ``storage`` is what the linear layers are stored as, adapted or not; ``device`` quantizes. Raises
    ReleaseError when the adapter has settings or tensors that cannot be merged right, when one matches
    nothing or something of another shape, and when the base's weights are not 16- or 32-bit floats.
    """
    updates = match_updates(adapter, checkpoint) if adapter else Updates({}, None, None)
    for entry in checkpoint.tensors.values():
        if entry.dtype.startswith("F8"):
            raise ReleaseError(
                f"{checkpoint.folder}: {entry.name!r} is {entry.dtype}", "name the base in 16-bit weights"
            )
    linear: frozenset[str] = frozenset()
    if quantization or storage != "bf16":
        linear = frozenset(quantized_names(checkpoint.config, checkpoint.tensors.values()))
    layout = Layout(storage, linear if storage != "bf16" else frozenset())
    return SumPlan(adapter, updates, linear if quantization else frozenset(), quantization, layout, device)


def _cut(entry: TensorEntry, columns: int, change: Callable[[int], Change | None]) -> list[Piece]:
    """Pieces of whole rows of ``columns`` numbers; ``change`` is asked for the change from a row on."""
    row = columns * DTYPE_BYTES[entry.dtype]
    rows = max(1, PIECE_BYTES // row)
    return [
        Piece(entry.offset + start, min(rows * row, entry.size - start), change(start // row))
        for start in range(0, entry.size, rows * row)
    ]


def _rounded(dtype: str, view: memoryview) -> memoryview:
    import torch

    return _bytes(_tensor(view, dtype).to(torch.bfloat16))


def _added(entry: TensorEntry, first: int, finish: Finish, device: str, view: memoryview) -> memoryview:
    """Rows of W from ``first`` on, with their rows of s·B·A added."""
    import torch

    weight = _tensor(view, entry.dtype).to(device).view(-1, entry.shape[1])
    if entry.dtype != PLAIN_DTYPE:
        weight = weight.to(torch.float32)
    finish(weight, first)
    return _bytes(weight.to(torch.bfloat16))


def _requantized(
    entry: TensorEntry,
    quantization: Quantization,
    finish: Finish | None,
    device: str,
    view: memoryview,
) -> memoryview:
    """The whole of W through 4 bits, with s·B·A added."""
    weight = _through(entry, quantization, device, view)
    if finish is not None:
        finish(weight, 0)
    return _bytes(weight)


def _stored_in_4bit(
    entry: TensorEntry,
    stored: list[Stored],
    through: Quantization | None,
    finish: Finish | None,
    device: str,
    view: memoryview,
) -> memoryview:
    """The sum, rounded once: from float32 to the nearest codes."""
    import torch
    from bitsandbytes import functional as bnb

    kind = stored[2].name.rpartition("__")[2]
    codes, scales = [], []
    for rows in _summed_rows(entry, through, finish, device, view):
        packed, state = bnb.quantize_4bit(
            rows.view(-1), blocksize=BLOCK, compress_statistics=False, quant_type=kind
        )
        codes.append(packed.view(-1))
        scales.append(state.absmax)
    weight = Quantized4bit(torch.cat(codes), torch.cat(scales), state.code)
    return encode_4bit(weight, stored, entry.shape)


def _chosen(
    chosen: Callable[[str], Quantized4bit], entry: TensorEntry, stored: list[Stored], _view: memoryview
) -> memoryview:
    return encode_4bit(chosen(entry.name), stored, entry.shape)


def _stored_in_int8(
    entry: TensorEntry,
    _stored: list[Stored],
    through: Quantization | None,
    finish: Finish | None,
    device: str,
    view: memoryview,
) -> memoryview:
    """The sum, rounded once: from float32 to int8 by each row's largest value (LLM.int8(), section 3.1)."""
    import torch

    codes, scales = [], []
    for rows in _summed_rows(entry, through, finish, device, view):
        largest = rows.abs().amax(dim=1)
        # A row of zeros has codes of zero, whatever its scale.
        codes.append(torch.round(rows * (127 / largest.clamp_min(1e-30)).unsqueeze(1)).to(torch.int8))
        scales.append(largest)
    return encode_int8(torch.cat(codes), torch.cat(scales))


def _summed_rows(
    entry: TensorEntry,
    through: Quantization | None,
    finish: Finish | None,
    device: str,
    view: memoryview,
) -> Iterator[torch.Tensor]:
    """W + s·B·A in float32, some rows at a time that end where a block ends."""
    import torch

    columns = entry.shape[1]
    if through is not None:
        weight = _through(entry, through, device, view)
    else:
        weight = _tensor(view, entry.dtype).to(device).view(entry.shape)
    whole = BLOCK // math.gcd(columns, BLOCK)
    step = whole * max(1, _PRODUCT_ITEMS // (columns * whole))
    for first in range(0, entry.shape[0], step):
        rows = weight[first : first + step].to(torch.float32)
        if finish is not None:
            finish(rows, first)
        yield rows


def _through(entry: TensorEntry, quantization: Quantization, device: str, view: memoryview) -> torch.Tensor:
    """W as training saw it, bfloat16."""
    import torch

    weight = _tensor(view, entry.dtype).to(device, torch.bfloat16).view(entry.shape)
    return through_4bit_(weight, quantization)


def _finish(
    adapter: Adapter | CombinedAdapter, update: Update, load: LoadPair, weight: torch.Tensor, first: int
) -> None:
    """Do to the rows of ``weight`` (rows, columns) from ``first`` on what the adapter does, in place.

    Each number is rounded once to the dtype of ``weight``.
    """
    import torch

    if update.rows is not None:
        assert isinstance(adapter, Adapter)
        _put(update.rows[0], adapter.load(update.rows[1]), weight, first)
    if update.pair is not None and update.magnitude is None:
        _add(update.pair, load, weight, first)
    elif update.pair is not None and update.magnitude is not None:
        assert isinstance(adapter, Adapter)
        wide = weight.to(torch.float32)
        _add(update.pair, load, wide, first)
        _rescale(adapter.load(update.magnitude).to(wide.device), update.pair.transposed, wide, first)
        weight.copy_(wide)


def _new_rows(adapter: Adapter, update: Update, _view: memoryview) -> memoryview:
    """The rows of new tokens, which follow the base's own."""
    import torch

    assert update.rows is not None
    numbers, entry = update.rows
    last = sorted(range(len(numbers)), key=lambda place: numbers[place])[-update.grown :]
    return _bytes(adapter.load(entry)[last].to(torch.bfloat16))


def _put(numbers: Sequence[int], rows: torch.Tensor, weight: torch.Tensor, first: int) -> None:
    for place, number in enumerate(numbers):
        if first <= number < first + weight.shape[0]:
            weight[number - first] = rows[place]


def _add(pair: LoraPair | CombinedPair, load: LoadPair, weight: torch.Tensor, first: int) -> None:
    """Add the rows of s·B·A from ``first`` on to ``weight`` (rows, columns), in place.

    In the order of PEFT's ``get_delta_weight``: the product in float32, times s, added in float32, rounded
    once.
    """
    a, b = load(pair.module)
    left, right = (a.T, b.T) if pair.transposed else (b, a)
    step = max(1, _PRODUCT_ITEMS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step]
        product = left[first + start : first + start + rows.shape[0]] @ right
        rows += product.mul_(pair.scale)


def _rescale(lengths: torch.Tensor, transposed: bool, weight: torch.Tensor, first: int) -> None:
    """Bring each output's weights to its trained length (DoRA, https://arxiv.org/abs/2402.09353, eq. 5)."""
    if transposed:  # the whole weight, an output a column
        weight *= (lengths / weight.norm(dim=0)).unsqueeze(0)
    else:
        weight *= (lengths[first : first + weight.shape[0]] / weight.norm(dim=1)).unsqueeze(1)


def _elsewhere(file: TensorFile, piece: Piece, _view: memoryview) -> memoryview:
    """A piece of another file than the shard that is being rewritten."""
    view = memoryview(read_bytes(file, piece.offset, piece.size))
    return piece.change(view) if piece.change else view


def _drop(view: memoryview) -> memoryview:
    return view[:0]


def _tensor(view: memoryview, dtype: str) -> torch.Tensor:
    import torch

    return torch.frombuffer(view, dtype=getattr(torch, FLOATS[dtype]))


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
