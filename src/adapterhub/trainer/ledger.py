"""The memory ledger: what a training run will hold, byte by byte, before any weight is loaded.

``ledger`` is a pure function of the model's shape, the recipe, the hardware and the planner's setting. Two
engines are known: ``fast`` (the CUDA path of ``adapterhub.trainer.fast``, whose layers keep what is listed in
``kept_bytes``) and ``plain`` (transformers and peft as they are, on the CPU or on CUDA). Notation as in
QLoRA: N quantized weights, h hidden, i intermediate, V vocabulary, T tokens of a micro-batch, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapterhub.packaging.evidence import LedgerPart
from adapterhub.packaging.manifest import Hardware, Quantization
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import Linear, ModelShape

MIB = 2**20
GIB = 2**30

Optimizer = Literal["adamw", "paged_adamw", "paged_adamw_8bit"]
Engine = Literal["fast", "plain"]
Place = Literal["device", "host"]

# Weights that share one 8-bit quantization constant when scales are quantized themselves (QLoRA section 3).
SCALE_BLOCK = 256
# Measured: Python with torch, transformers, peft, bitsandbytes and their kernels, resident on the CPU.
PROCESS_BYTES = 560 * MIB
# Measured on the CPU: free blocks that the C allocator keeps between the tensors that backward needs.
CPU_FRAGMENTATION = 0.30
# The CUDA context with cuBLAS's workspaces.
CUDA_CONTEXT_BYTES = 512 * MIB
# Tokens whose logits exist at once when the loss is computed in chunks.
LOSS_CHUNK = 1024


@dataclass(frozen=True)
class Setting:
    """What the planner is free to choose."""

    micro_batch: int
    """Rows that go through the model at once."""
    optimizer: Optimizer
    engine: Engine
    recompute_all: int = 0
    """Layers of which only the input is kept."""
    recompute_mlp: int = 0
    """Further layers that keep what attention's backward needs and compute gate and up again."""
    offload: bool = False
    """Whether what recomputed layers keep waits in pinned host memory."""


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


def ledger(shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting) -> Ledger:
    """The bytes a run of ``recipe`` on ``shape`` holds at its peak, part by part.

    Raises RecipeError when ``lora.target_modules`` names modules the shape does not have.
    """
    cuda = hardware.device == "cuda"
    parts = [*_base_parts(shape, recipe.quantization), *_adapter_parts(shape, recipe, setting, cuda)]
    if setting.engine == "fast":
        parts += _fast_activations(shape, recipe, setting)
    else:
        parts += _plain_activations(shape, recipe, setting, cuda)
    parts += _cuda_overhead(parts) if cuda else _cpu_overhead(shape, recipe.quantization)
    return Ledger(tuple(part for part in parts if part.bytes))


def scale_bits(quantization: Quantization) -> float:
    """Bits a weight that the scales of 4-bit blocks cost: 0.5 for blocks of 64, 0.127 when quantized
    themselves.
    """
    block = quantization.block_size
    return 8 / block + 32 / (block * SCALE_BLOCK) if quantization.double else 32 / block


def adapter_weights(shape: ModelShape, recipe: Recipe) -> int:
    """Parameters of the adapter: r (in + out) for each adapted module."""
    adapted = shape.adapted(recipe.lora.target_modules)
    return sum(recipe.lora.rank * (linear.inputs + linear.outputs) * linear.count for linear in adapted)


def _base_parts(shape: ModelShape, quantization: Quantization | None) -> Iterator[LedgerPart]:
    weights = shape.quantized_weights
    if quantization is None:
        yield _part("base weights", 2 * weights, f"{weights:,} weights, 2 B each in bf16")
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
    plain = shape.plain_weights
    yield _part(
        "unquantized weights", 2 * plain, f"{plain:,} in embeddings, head and norms, 2 B each in bf16"
    )


def _adapter_parts(shape: ModelShape, recipe: Recipe, setting: Setting, cuda: bool) -> Iterator[LedgerPart]:
    count = adapter_weights(shape, recipe)
    paged: Place = "host" if cuda and setting.optimizer != "adamw" else "device"
    where = ", paged to the host" if paged == "host" else ""
    # Only the step reads the fp32 weights of the fast path, so they page with the moments; products use the
    # copies.
    masters: Place = paged if setting.engine == "fast" else "device"
    beside = where if masters == "host" else ""
    yield _part(
        "adapter weights",
        4 * count,
        f"rank {recipe.lora.rank}: {count:,} parameters, 4 B each in fp32{beside}",
        on=masters,
    )
    yield _part("adapter copies", 2 * count, "2 B a parameter: the bf16 weights that products use")
    yield _part("adapter gradients", 4 * count, "4 B a parameter in fp32")
    if setting.optimizer == "paged_adamw_8bit":
        bytes_each, how = 2 + 2 * 4 / SCALE_BLOCK, "two 8-bit moments and their scales"
    else:
        bytes_each, how = 8.0, "two fp32 moments"
    yield _part(
        "optimizer state", bytes_each * count, f"{bytes_each:.3g} B a parameter: {how}{where}", on=paged
    )


def kept_bytes(shape: ModelShape, level: Literal["none", "mlp", "all"]) -> int:
    """Bytes a token that one layer of the fast path keeps for its backward.

    ``all`` recomputed: the layer's input. ``mlp``: also query, key, value, attention's output with its
    log-sum-exp, and the residual after attention. ``none``: also gate and up.
    """
    kept = 2 * shape.hidden
    if level != "all":
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        kept += 2 * (2 * queries + 2 * keys + shape.hidden) + 4 * shape.heads
    if level == "none":
        kept += 2 * 2 * shape.intermediate
    return kept


def _fast_activations(shape: ModelShape, recipe: Recipe, setting: Setting) -> Iterator[LedgerPart]:
    tokens = setting.micro_batch * recipe.data.max_length
    kept_whole = shape.layers - setting.recompute_all - setting.recompute_mlp
    whole, attention, only_input = (kept_bytes(shape, level) for level in ("none", "mlp", "all"))
    recomputed = tokens * (setting.recompute_all * only_input + setting.recompute_mlp * attention)
    yield _part(
        "saved activations",
        tokens * kept_whole * whole,
        f"{tokens:,} tokens, {kept_whole} layers of {whole:,} B: input, q, k, v, attention, gate, up",
    )
    yield _part(
        "saved for recomputing",
        recomputed,
        f"{tokens:,} tokens, {setting.recompute_all} layers of {only_input:,} B, "
        f"{setting.recompute_mlp} of {attention:,} B",
        on="host" if setting.offload else "device",
    )
    if setting.offload:
        widest = only_input if setting.recompute_all else attention
        yield _part(
            "offload buffers", 2 * tokens * widest, "two layers' worth on their way to and from the host"
        )
    again = (4 * shape.intermediate if kept_whole < shape.layers else 0) + (
        kept_bytes(shape, "mlp") - kept_bytes(shape, "all") if setting.recompute_all else 0
    )
    yield _part("recomputed layer", tokens * again, "what one layer computes again in its backward")
    working = tokens * (4 * shape.intermediate + 6 * shape.hidden)
    yield _part("working set", working, "gradients inside one layer")
    yield _part("dequantized weight", 2 * shape.largest_linear, "the largest linear's weights, 2 B each")
    chunk = min(tokens, LOSS_CHUNK)
    logits = 2 * 2 * chunk * shape.vocab
    yield _part(
        "loss",
        logits + 3 * 2 * tokens * shape.hidden,
        f"logits of {chunk:,} tokens at a time; last hidden state",
    )


def _plain_activations(
    shape: ModelShape, recipe: Recipe, setting: Setting, cuda: bool
) -> Iterator[LedgerPart]:
    tokens = setting.micro_batch * recipe.data.max_length
    layer = tokens * _plain_layer_bytes(shape, recipe)
    kept = shape.layers - setting.recompute_all
    yield _part(
        "saved activations", kept * layer, f"{tokens:,} tokens, {kept} layers of {layer // tokens:,} B"
    )
    yield _part(
        "saved for recomputing",
        setting.recompute_all * tokens * 2 * shape.hidden,
        f"{setting.recompute_all} layers of {2 * shape.hidden:,} B a token: their input",
    )
    working = tokens * (8 * shape.intermediate + 8 * shape.hidden) + 2 * 2 * shape.largest_linear
    if setting.recompute_all:
        working += layer
    yield _part(
        "working set", working, "one layer's gradients and dequantized weights, and what it computes again"
    )
    yield _part("loss", 14 * tokens * shape.vocab, "14 B a logit: bf16, fp32, its log-softmax and gradient")
    if not cuda:
        yield _part(
            "allocator", CPU_FRAGMENTATION * kept * layer, "free blocks between saved ones, 30 % of them"
        )


def _plain_layer_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """Bytes a token that autograd saves in one layer of transformers with peft under bf16 autocast.

    Each LoRA module keeps its own bf16 copy of its input and its product with A; the activation keeps gate,
    its value and up; attention keeps query, key and value with the key-value heads repeated, its output and
    its mask; each norm keeps its input in fp32.
    """
    adapted = [linear for linear in shape.adapted(recipe.lora.target_modules) if linear not in shape.tower]
    copies = sum(_lora_copies(linear, recipe) for linear in adapted)
    heads = shape.heads * shape.head_dim
    attention = 2 * 4 * heads + 4 * shape.heads + 2 * recipe.data.max_length
    return copies + 2 * 3 * shape.intermediate + attention + 4 * shape.layer_norm_weights


def _lora_copies(linear: Linear, recipe: Recipe) -> int:
    mask = 4 * linear.inputs if recipe.lora.dropout else 0
    return 2 * (linear.inputs + recipe.lora.rank) + mask


def _cpu_overhead(shape: ModelShape, quantization: Quantization | None) -> list[LedgerPart]:
    mapped = 2 * shape.quantized_weights if quantization else 0
    return [
        _part(
            MAPPED, mapped, "the bf16 file stays mapped after it is quantized; the system may take it back"
        ),
        _part("process", PROCESS_BYTES, "Python, torch and the other libraries; measured"),
    ]


def _cuda_overhead(parts: list[LedgerPart]) -> list[LedgerPart]:
    moving = sum(part.bytes for part in parts if part.name in ("working set", "loss") and part.on == "device")
    return [
        _part(
            "allocator", 0.10 * moving, "10 % of working set and loss: blocks torch reserves and cannot reuse"
        ),
        _part("CUDA context", CUDA_CONTEXT_BYTES, "driver, kernels and cuBLAS workspaces; measured"),
    ]


def _part(name: str, size: float, formula: str, on: Place = "device") -> LedgerPart:
    return LedgerPart(name=name, bytes=round(size), formula=formula, on=on)
