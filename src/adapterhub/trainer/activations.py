"""What the fast engine's passes of one micro-batch hold on the device, for the ledger: kept activations and
working memory. Those of transformers' own layers are in ``layer_activations``.

Notation as in ``ledger``: T tokens, h hidden, i intermediate, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapterhub.packaging.evidence import LedgerPart
from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.placement import largest_rank
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import Linear, ModelShape

Optimizer = Literal["adamw", "paged_adamw", "paged_adamw_8bit"]
Engine = Literal["fast", "linears", "plain"]
Place = Literal["device", "host"]
Level = Literal["none", "mlp", "all"]

# Tokens whose logits exist at once when the loss is computed in chunks.
LOSS_CHUNK = 1024
# Weights that share an input are dequantized side by side, for one product, up to this many bytes.
STACKED_BYTES = 256 * 2**20
_SHARED_INPUTS = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}


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
    """Whether the inputs of the ``recompute_all`` layers wait in pinned host memory."""
    kept_weights: int = 0
    """Layers whose weights stay dequantized, for forward and backward, over the micro-batches of a step."""
    shards: int = 1
    """GPUs that hold a part each of base, adapter and optimizer (FSDP); 1: each holds all of it."""


def kept_bytes(shape: ModelShape, level: Level) -> int:
    """Bytes a token that one layer of the fast path keeps for its backward.

    ``all`` recomputed: the layer's input. ``mlp``: also query, key, value, attention's output with its
    log-sum-exp, the residual after attention, and the norms' 1/rms. ``none``: also gate and up.
    """
    kept = 2 * shape.hidden
    if level != "all":
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        kept += 2 * (2 * queries + 2 * keys + shape.hidden) + 4 * shape.heads + 2 * 4
    if level == "none":
        kept += 2 * 2 * shape.intermediate
    return kept


def fast_activations(shape: ModelShape, recipe: Recipe, setting: Setting) -> Iterator[LedgerPart]:
    """Parts of the fast engine. The peak is at the start of backward, when every layer's values are kept."""
    tokens = setting.micro_batch * recipe.data.max_length
    kept_whole = shape.layers - setting.recompute_all - setting.recompute_mlp
    none, mlp, inputs = (kept_bytes(shape, level) for level in ("none", "mlp", "all"))
    yield ledger_part(
        "saved activations",
        tokens * kept_whole * none,
        f"{tokens:,} tokens, {kept_whole} layers of {none:,} B: input, q, k, v, attention, residual, MLP",
    )
    yield ledger_part(
        "saved beside MLPs",
        tokens * setting.recompute_mlp * mlp,
        f"{tokens:,} tokens, {setting.recompute_mlp} layers of {mlp:,} B: all but gate and up",
    )
    yield ledger_part(
        "saved inputs",
        tokens * setting.recompute_all * inputs,
        f"{tokens:,} tokens, {setting.recompute_all} layers of {inputs:,} B",
        on="host" if setting.offload else "device",
    )
    # Backward begins at the last layer, which is one of those that keep most.
    last_recomputed = not kept_whole and not setting.recompute_mlp
    again = 0 if kept_whole else none - inputs if last_recomputed else none - mlp
    working = tokens * _fast_working_bytes(shape, recipe)
    forward = 0
    if setting.offload:
        moving = min(2, setting.recompute_all)
        yield ledger_part(
            "offload buffers", moving * tokens * inputs, f"{moving} layers' inputs on their way to and fro"
        )
        # Forward holds the embeddings and the layer's output too, and its input where that is not kept.
        held = (3 if last_recomputed else 2) * inputs + 2 * shape.intermediate
        forward = max(0, tokens * held - working)
        yield ledger_part(
            "offloading forward",
            forward,
            "beyond the working set: embeddings, gated product, the last layer's input and output",
        )
    yield ledger_part(
        "recomputed layer", tokens * again, "what the last layer computes again in its backward"
    )
    yield ledger_part("working set", working, f"{working // tokens:,} B a token: gradients inside one layer")
    yield ledger_part(
        "dequantized weight", _dequantized_bytes(shape), "of the linears that share an input, 2 B each"
    )
    yield ledger_part(
        "kept weights",
        setting.kept_weights * layer_weights(shape) * 2 * 2,
        f"{setting.kept_weights} layers dequantized, 2 B a weight for forward and for backward",
    )
    chunk = min(tokens, LOSS_CHUNK)
    loss = 2 * 2 * chunk * shape.vocab + tokens * (3 * 2 * shape.hidden + 4)
    yield ledger_part(
        "loss",
        max(0, loss - working - forward - tokens * again),
        f"beyond what backward takes later: logits of {chunk:,} tokens twice, last hidden state, its norm "
        "and gradient",
    )


def _fast_working_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """Bytes a token inside a layer's backward beyond what it keeps, at the larger of its two halves' peaks.

    The second half frees gate and up, so the first has their room.
    """
    hidden, intermediate = 2 * shape.hidden, 2 * shape.intermediate
    rank = 2 * largest_rank(shape, recipe.lora)
    queries, keys = 2 * shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim
    mlp = hidden + max(intermediate + 2 * rank, 2 * hidden + 4 * rank)
    copies = queries + keys if shape.head_norms else 0
    expanded = 2 * queries if keys < queries else 0  # gradients of key and value by query head
    summed = 2 * queries  # the query's gradient, in fp32
    kernel = queries + copies + (queries + 2 * keys) + summed + expanded
    joined = 2 * (queries + 2 * keys) + copies
    products = queries + 2 * keys + 2 * hidden + 6 * rank
    attention = hidden + max(kernel, joined, products) - 2 * intermediate
    if recipe.lora.dropout:
        mlp += 7 * shape.intermediate  # a mask as it is drawn, compared and scaled
    rotary_and_batch = 2 * 2 * shape.head_dim + 5 * 8
    return max(mlp, attention) + rotary_and_batch


def layer_weights(shape: ModelShape) -> int:
    """Weights of one layer's linear modules."""
    return sum(linear.weights for linear in shape.linears)


def _dequantized_bytes(shape: ModelShape) -> int:
    """The buffer for weights of linears that share an input: all of them, or the largest of many."""
    groups: dict[str, list[int]] = {}
    for linear in shape.linears:
        groups.setdefault(input_of(linear), []).append(2 * linear.weights)
    return max(sum(sizes) if sum(sizes) <= STACKED_BYTES else max(sizes) for sizes in groups.values())


def input_of(linear: Linear) -> str:
    """A name for what ``linear`` is applied to in its layer: the same for those that share it."""
    name = linear.path.rpartition(".")[2]
    return _SHARED_INPUTS.get(name, name)


def element_of(hardware: Hardware) -> tuple[int, str]:
    """Bytes of a number that ``hardware`` computes with, and its dtype's short name."""
    return (4, "fp32") if hardware.arithmetic == "float32" else (2, "bf16")


def ledger_part(name: str, size: float, formula: str, on: Place = "device") -> LedgerPart:
    """One line of the ledger, its ``size`` rounded to whole bytes."""
    return LedgerPart(name=name, bytes=round(size), formula=formula, on=on)
