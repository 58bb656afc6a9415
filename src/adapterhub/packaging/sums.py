"""The sums W + s·B·A of a merge: what happens to each tensor of a checkpoint, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import Adapter, LoraPair
from adapterhub.packaging.checkpoint import Checkpoint
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
from adapterhub.packaging.tensors import DTYPE_BYTES, FLOATS, TensorEntry, TensorFile

if TYPE_CHECKING:
    import torch

    LoadPair = Callable[[str], tuple[torch.Tensor, torch.Tensor]]

# Bytes changed at a time: large enough to make calls cheap, small enough that a dozen in flight stay under
# 100 MB.
PIECE_BYTES = 4 * 1024 * 1024
# Numbers of the float32 product B·A that are made at a time: it is still in the core's own cache when it is
# added, and the allocator hands the same memory out again (four times as many take 2.5 times as long).
_PRODUCT_ITEMS = 1 << 17
_PAIRS_KEPT = 4
_UNMERGED = "load it unmerged with PEFT, or merge it with PEFT's merge_and_unload"


@dataclass(frozen=True)
class SumPlan:
    """Which tensors of the checkpoint change, and how."""

    adapter: Adapter
    pairs: dict[str, LoraPair]
    """By the name of the weight that the factors are added to."""
    quantized: frozenset[str]
    """The weights that go through 4 bits first."""
    quantization: Quantization | None
    layout: Layout
    """What the results are stored as."""

    def pieces(self, shard: TensorFile) -> list[Piece]:
        """The pieces of one shard in order, covering every tensor."""
        load = lru_cache(maxsize=_PAIRS_KEPT)(self.adapter.load_pair)
        stored = self.layout.of_shard(shard)
        return [
            piece for entry in shard.entries for piece in self._pieces_of(entry, stored[entry.name], load)
        ]

    def _pieces_of(self, entry: TensorEntry, stored: list[Stored], load: LoadPair) -> list[Piece]:
        pair = self.pairs.get(entry.name)
        add = partial(_add, pair, self.adapter.config.fan_in_fan_out, load) if pair else None
        if entry.name in self.layout.quantized:
            through = self.quantization if entry.name in self.quantized else None
            store = _stored_in_int8 if self.layout.storage == "int8" else _stored_in_4bit
            return [Piece(entry.offset, entry.size, partial(store, entry, stored, through, add))]
        if entry.name in self.quantized:
            assert self.quantization is not None
            return [Piece(entry.offset, entry.size, partial(_requantized, entry, self.quantization, add))]
        if add is not None:
            return _cut(entry, entry.shape[1], lambda first: partial(_added, entry, first, add))
        if entry.dtype in FLOATS and entry.dtype != PLAIN_DTYPE:
            return _cut(entry, 1, lambda _first: partial(_rounded, entry.dtype))
        return _cut(entry, 1, lambda _first: None)


def plan_sums(
    adapter: Adapter, checkpoint: Checkpoint, quantization: Quantization | None, storage: Storage = "bf16"
) -> SumPlan:
    """Match every factor with a weight of the base.

    ``quantization`` is what the base's linear layers went through, None to add to them as they are;
    ``storage`` is what the linear layers are stored as, adapted or not. Raises
    ReleaseError when the adapter has settings or tensors that cannot be merged right, when a factor matches
    no weight or one of another shape, and when the base's weights are not 16- or 32-bit floats.
    """
    _check_settings(adapter)
    pairs = _match(adapter, checkpoint)
    if adapter.others:
        raise ReleaseError(
            f"{adapter.file.path} holds more than factors of linear layers: {_some(adapter.others)}",
            _UNMERGED,
        )
    for entry in checkpoint.tensors.values():
        if entry.dtype.startswith("F8"):
            raise ReleaseError(
                f"{checkpoint.folder}: {entry.name!r} is {entry.dtype}", "name the base in 16-bit weights"
            )
    for name, pair in pairs.items():
        expected = (pair.out_features, pair.in_features)
        entry = checkpoint.tensors[name]
        if entry.shape != (expected[::-1] if adapter.config.fan_in_fan_out else expected):
            raise ReleaseError(
                f"{name!r} has shape {list(entry.shape)} in {checkpoint.folder}; the factors are for "
                f"{pair.out_features} outputs and {pair.in_features} inputs",
                "merge it into the base it was trained on",
            )
        if entry.dtype not in FLOATS:
            raise ReleaseError(
                f"{name!r} is {entry.dtype} in {checkpoint.folder}", "name the base in 16-bit weights"
            )
    linear: frozenset[str] = frozenset()
    if quantization or storage != "bf16":
        linear = frozenset(quantized_names(checkpoint.config, checkpoint.tensors.values()))
    layout = Layout(storage, linear if storage != "bf16" else frozenset())
    return SumPlan(adapter, pairs, linear if quantization else frozenset(), quantization, layout)


def _check_settings(adapter: Adapter) -> None:
    obstacles = adapter.config.obstacles()
    if obstacles:
        raise ReleaseError(
            f"{adapter.folder} cannot be merged right yet: it sets {'; '.join(obstacles)}", _UNMERGED
        )
    if not adapter.pairs:
        raise ReleaseError(f"{adapter.file.path} holds no LoRA factors of a linear layer", _UNMERGED)


def _match(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, LoraPair]:
    """Factors by the name of their weight; a bare model's checkpoint lacks the first part of each name."""
    for strip in (False, True):
        names = {
            f"{_stripped(module) if strip else module}.weight": pair for module, pair in adapter.pairs.items()
        }
        missing = [name for name in names if name not in checkpoint.tensors]
        if not missing:
            return names
        if not strip:
            unmatched = missing
    if unmatched == ["lm_head.weight"]:
        raise ReleaseError(
            f"the adapter changes lm_head, which {checkpoint.folder} ties to its embeddings",
            "load it unmerged with PEFT; merging would change the embeddings too",
        )
    raise ReleaseError(
        f"{len(unmatched)} of the adapter's {len(adapter.pairs)} modules match no weight in "
        f"{checkpoint.folder}: {_some(unmatched)}",
        "merge it into the base it was trained on",
    )


def _stripped(module: str) -> str:
    return module.partition(".")[2]


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


def _added(
    entry: TensorEntry, first: int, add: Callable[[torch.Tensor, int], None], view: memoryview
) -> memoryview:
    """Rows of W from ``first`` on, with their rows of s·B·A added."""
    import torch

    weight = _tensor(view, entry.dtype).view(-1, entry.shape[1])
    if entry.dtype != PLAIN_DTYPE:
        weight = weight.to(torch.float32)
    add(weight, first)
    return _bytes(weight.to(torch.bfloat16))


def _requantized(
    entry: TensorEntry,
    quantization: Quantization,
    add: Callable[[torch.Tensor, int], None] | None,
    view: memoryview,
) -> memoryview:
    """The whole of W through 4 bits, with s·B·A added."""
    weight = _through(entry, quantization, view)
    if add is not None:
        add(weight, 0)
    return _bytes(weight)


def _stored_in_4bit(
    entry: TensorEntry,
    stored: list[Stored],
    through: Quantization | None,
    add: Callable[[torch.Tensor, int], None] | None,
    view: memoryview,
) -> memoryview:
    """The sum, rounded once: from float32 to the nearest codes."""
    import torch
    from bitsandbytes import functional as bnb

    kind = stored[2].name.rpartition("__")[2]
    codes, scales = [], []
    for rows in _summed_rows(entry, through, add, view):
        packed, state = bnb.quantize_4bit(
            rows.view(-1), blocksize=BLOCK, compress_statistics=False, quant_type=kind
        )
        codes.append(packed.view(-1))
        scales.append(state.absmax)
    weight = Quantized4bit(torch.cat(codes), torch.cat(scales), state.code)
    return encode_4bit(weight, stored, entry.shape)


def _stored_in_int8(
    entry: TensorEntry,
    _stored: list[Stored],
    through: Quantization | None,
    add: Callable[[torch.Tensor, int], None] | None,
    view: memoryview,
) -> memoryview:
    """The sum, rounded once: from float32 to int8 by each row's largest value (LLM.int8(), section 3.1)."""
    import torch

    codes, scales = [], []
    for rows in _summed_rows(entry, through, add, view):
        largest = rows.abs().amax(dim=1)
        # A row of zeros has codes of zero, whatever its scale.
        codes.append(torch.round(rows * (127 / largest.clamp_min(1e-30)).unsqueeze(1)).to(torch.int8))
        scales.append(largest)
    return encode_int8(torch.cat(codes), torch.cat(scales))


def _summed_rows(
    entry: TensorEntry,
    through: Quantization | None,
    add: Callable[[torch.Tensor, int], None] | None,
    view: memoryview,
) -> Iterator[torch.Tensor]:
    """W + s·B·A in float32, some rows at a time that end where a block ends."""
    import torch

    columns = entry.shape[1]
    if through is not None:
        weight = _through(entry, through, view)
    else:
        weight = _tensor(view, entry.dtype).view(entry.shape)
    whole = BLOCK // math.gcd(columns, BLOCK)
    step = whole * max(1, _PRODUCT_ITEMS // (columns * whole))
    for first in range(0, entry.shape[0], step):
        rows = weight[first : first + step].to(torch.float32)
        if add is not None:
            add(rows, first)
        yield rows


def _through(entry: TensorEntry, quantization: Quantization, view: memoryview) -> torch.Tensor:
    """W as training saw it, bfloat16."""
    import torch

    weight = _tensor(view, entry.dtype).to(torch.bfloat16).view(entry.shape)
    return through_4bit_(weight, quantization)


def _add(pair: LoraPair, transposed: bool, load: LoadPair, weight: torch.Tensor, first: int) -> None:
    """Add the rows of s·B·A from ``first`` on to ``weight`` (rows, columns), in place.

    In the order of PEFT's ``get_delta_weight``: the product in float32, times s, added in float32, rounded
    once.
    """
    a, b = load(pair.module)
    left, right = (a.T, b.T) if transposed else (b, a)
    step = max(1, _PRODUCT_ITEMS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step]
        product = left[first + start : first + start + rows.shape[0]] @ right
        rows += product.mul_(pair.scale)


def _tensor(view: memoryview, dtype: str) -> torch.Tensor:
    import torch

    return torch.frombuffer(view, dtype=getattr(torch, FLOATS[dtype]))


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
