"""The memory ledger: what a training run will hold, byte by byte, before any weight is loaded.

``ledger`` is a pure function of the model's shape, the recipe, the hardware and the planner's setting. Three
engines are known: ``fast`` (the CUDA path of ``adapterhub.trainer.fast``), ``linears`` (its products and loss
inside transformers' layers) and ``plain`` (transformers and peft as they are, on the CPU or on CUDA); what
their passes hold is counted in ``activations`` and ``layer_activations``. Notation as in QLoRA: N quantized
weights, h hidden, i intermediate, V vocabulary, T tokens of a micro-batch, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapterhub.packaging.evidence import LedgerPart
from adapterhub.packaging.manifest import Hardware, Quantization
from adapterhub.trainer.activations import (
    Place,
    Setting,
    element_of,
    fast_activations,
    kept_bytes,
)
from adapterhub.trainer.activations import ledger_part as _part
from adapterhub.trainer.layer_activations import linears_activations, plain_activations
from adapterhub.trainer.placement import adapter_weights, place_adapter, token_weights
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import ModelShape

MIB = 2**20
GIB = 2**30

# Weights that share one 8-bit quantization constant when scales are quantized themselves (QLoRA section 3).
SCALE_BLOCK = 256
# Measured: Python with torch, transformers, peft, bitsandbytes and their kernels, resident on the CPU.
PROCESS_BYTES = 560 * MIB
# Measured on an H200 (CUDA 13): the context with all kernels of a step loaded; what further streams add to
# it; and the device's page tables of pinned host memory, 8 B a page of 4 KiB.
CUDA_CONTEXT_BYTES = 767 * MIB
STREAMS_BYTES = 72 * MIB
PINNED_PAGE = 4096
# What cuBLAS works in on Hopper, for each of two threads: forward's and backward's.
CUBLAS_BYTES = 32 * MIB
# Weights that pass through the device at once, on each of two streams, when their state is paged.
PAGED_CHUNK = 4 * MIB


@dataclass(frozen=True)
class Ledger:
    """Bytes by part."""

    parts: tuple[LedgerPart, ...]

    @property
    def predicted_peak_bytes(self) -> int:
        """Sum of the parts on the device: torch's reserved bytes and the context on CUDA, the resident set on
        the CPU.
        """
        return sum(part.bytes for part in self.parts if part.on == "device")

    @property
    def host_bytes(self) -> int:
        """Bytes that a GPU run holds in host memory."""
        return sum(part.bytes for part in self.parts if part.on == "host")

    @property
    def reclaimable_bytes(self) -> int:
        """Bytes counted in the peak that the system takes back when memory is short: a file's pages."""
        return sum(part.bytes for part in self.parts if part.name == MAPPED)


MAPPED = "checkpoint pages"
_MOVING = ("working set", "loss", "offload buffers")


def ledger(shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting) -> Ledger:
    """The bytes a run of ``recipe`` on ``shape`` holds at its peak, part by part.

    Raises RecipeError when ``lora.target_modules`` names modules the shape does not have.
    """
    cuda = hardware.device == "cuda"
    parts = [*_base_parts(shape, recipe, hardware)]
    parts += _adapter_parts(shape, recipe, setting, hardware)
    if setting.shards > 1:
        parts = list(_sharded(shape, parts, setting.shards))
    if setting.engine == "fast":
        parts += fast_activations(shape, recipe, setting)
    elif setting.engine == "linears":
        parts += linears_activations(shape, recipe, setting)
    else:
        parts += plain_activations(shape, recipe, setting, hardware)
    if cuda:
        left = _left_behind(shape, recipe, setting) if setting.engine != "plain" else 0.0
        parts += _cuda_overhead(parts, left)
    else:
        parts += _cpu_overhead(shape, recipe.quantization)
    return Ledger(tuple(part for part in parts if part.bytes))


def scale_bits(quantization: Quantization) -> float:
    """Bits a weight that the scales of 4-bit blocks cost: 0.5 for blocks of 64, 0.127 when quantized
    themselves.
    """
    block = quantization.block_size
    return 8 / block + 32 / (block * SCALE_BLOCK) if quantization.double else 32 / block


def _base_parts(shape: ModelShape, recipe: Recipe, hardware: Hardware) -> Iterator[LedgerPart]:
    weights, quantization = shape.quantized_weights, recipe.quantization
    width, dtype = element_of(hardware)
    if quantization is None:
        yield _part("base weights", width * weights, f"{weights:,} weights, {width} B each in {dtype}")
    elif quantization.type == "int8":
        rows = sum(linear.outputs * linear.count for linear in (*shape.linears, *shape.tower))
        yield _part("base codes", weights, f"{weights:,} weights, 1 B each in int8")
        yield _part("base scales", 4 * rows, f"{rows:,} rows, 4 B each")
    else:
        yield _part(
            "base codes", weights / 2, f"{weights:,} weights, 4 bits each in {quantization.type.upper()}"
        )
        bits = scale_bits(quantization)
        how = "quantized to 8 bits themselves" if quantization.double else "fp32"
        yield _part(
            "base scales",
            weights * bits / 8,
            f"{bits:.3f} bits a weight: blocks of {quantization.block_size}, {how}",
        )
    plain = shape.plain_weights + token_weights(shape, recipe.lora)
    yield _part(
        "unquantized weights",
        width * plain,
        f"{plain:,} in embeddings, head and norms, {width} B each in {dtype}",
    )


def _adapter_parts(
    shape: ModelShape, recipe: Recipe, setting: Setting, hardware: Hardware
) -> Iterator[LedgerPart]:
    cuda, bf16 = hardware.device == "cuda", hardware.arithmetic == "bfloat16"
    count = adapter_weights(shape, recipe.lora) + token_weights(shape, recipe.lora)
    paged: Place = "host" if cuda and setting.optimizer != "adamw" else "device"
    where = ", paged to the host" if paged == "host" else ""
    # Only the step reads the fp32 weights of the fast path, so they page with the moments; products use the
    # copies.
    masters: Place = paged if setting.engine != "plain" else "device"
    beside = where if masters == "host" else ""
    yield _part(
        "adapter weights",
        4 * count,
        f"{_adapter_in_words(shape, recipe)}: {count:,} parameters, 4 B each in fp32{beside}",
        on=masters,
    )
    if bf16:
        yield _part("adapter copies", 2 * count, "2 B a parameter: the bf16 weights that products use")
    yield _part("adapter gradients", 4 * count, "4 B a parameter in fp32")
    if setting.optimizer == "paged_adamw_8bit":
        bytes_each, how = 2 + 2 * 4 / SCALE_BLOCK, "two 8-bit moments and their scales"
    else:
        bytes_each, how = 8.0, "two fp32 moments"
    yield _part(
        "optimizer state", bytes_each * count, f"{bytes_each:.3g} B a parameter: {how}{where}", on=paged
    )
    if paged == "host" and setting.engine != "plain":
        passing = 2 * min(count, PAGED_CHUNK)
        yield _part(
            "optimizer chunks", passing * (4 + bytes_each), f"{passing:,} parameters on their way to and fro"
        )


def _sharded(shape: ModelShape, parts: list[LedgerPart], shards: int) -> Iterator[LedgerPart]:
    """Each part's share, and what is gathered at a time: two layers, for the next comes while one computes,
    and embeddings and head, which are one group with the rest of the model.
    """
    layers = sum(part.bytes for part in parts if part.name in ("base codes", "base scales", "base weights"))
    layers += sum(part.bytes for part in parts if part.name == "adapter weights")
    whole = sum(part.bytes for part in parts if part.name == "unquantized weights")
    for part in parts:
        if part.name == "adapter copies":  # products use them as they are gathered
            continue
        how = f"1/{shards} of: {part.formula}"
        yield part.model_copy(update={"bytes": part.bytes // shards, "formula": how})
    yield _part(
        "gathered weights", 2 * layers / shape.layers + whole, "two layers, and embeddings and head, whole"
    )


def _adapter_in_words(shape: ModelShape, recipe: Recipe) -> str:
    ranks = sorted({placed.rank for placed in place_adapter(shape, recipe.lora)})
    words = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    if recipe.lora.dora:
        words += " with DoRA's lengths"
    if recipe.lora.new_tokens:
        words += f" and {len(recipe.lora.new_tokens)} new tokens' rows"
    return words


def _cpu_overhead(shape: ModelShape, quantization: Quantization | None) -> list[LedgerPart]:
    mapped = 2 * shape.quantized_weights if quantization else 0
    return [
        _part(
            MAPPED, mapped, "the bf16 file stays mapped after it is quantized; the system may take it back"
        ),
        _part("process", PROCESS_BYTES, "Python, torch and the other libraries; measured"),
    ]


def _left_behind(shape: ModelShape, recipe: Recipe, setting: Setting) -> float:
    """Bytes that our own engines' allocations leave reserved and unused, beside its working set's.

    A tenth of one layer's values, which come and go in different sizes; and 30 % of peft's own fp32 adapter
    weights, which the flat buffers replace: the blocks they leave are too small for most of what follows.
    Both were fitted to benchmarks/results/ledger_accuracy.json, where they leave 1.0 % of a peak unexplained.
    """
    values = setting.micro_batch * recipe.data.max_length * kept_bytes(shape, "none")
    return 0.10 * values + 0.30 * 4 * adapter_weights(shape, recipe.lora)


def _cuda_overhead(parts: list[LedgerPart], left: float) -> Iterator[LedgerPart]:
    """What torch has reserved beyond what is allocated, ``left`` beside a tenth of the working memory, and
    what CUDA holds itself.
    """
    moving = sum(part.bytes for part in parts if part.name in _MOVING and part.on == "device")
    replaced = ", 30 % of the adapter weights that the flat buffers replaced" if left else ""
    yield _part(
        "allocator",
        0.10 * moving + left,
        f"reserved and not reused: 10 % of what comes and goes{replaced}; measured",
    )
    yield _part("cuBLAS workspaces", 2 * CUBLAS_BYTES, "32 MiB each for forward's and backward's thread")
    pinned = sum(part.bytes for part in parts if part.on == "host")
    yield _part(
        "CUDA context",
        CUDA_CONTEXT_BYTES + (STREAMS_BYTES + pinned * 8 / PINNED_PAGE if pinned else 0),
        "driver and kernels; with pinned host memory its page tables, 8 B a page, and streams; measured",
    )
