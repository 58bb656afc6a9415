"""What the passes of one micro-batch hold on the device, for the ledger: kept activations and working memory.

Notation as in ``ledger``: T tokens, h hidden, i intermediate, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapterhub.packaging.evidence import LedgerPart
from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.placement import Placed, largest_rank, place_adapter
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
# Measured on the CPU: free blocks that the C allocator keeps between the tensors that backward needs.
_CPU_FRAGMENTATION = 0.30
# Bytes of a soft-capped score, one a head and pair of tokens: its tanh, its softmax in fp32, and in bf16 that
# again as the product takes it; and in backward the gradients of these.
_SCORE = 8
_SCORE_GRADIENT = 12
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
    if setting.offload:
        moving = min(2, setting.recompute_all)
        yield ledger_part(
            "offload buffers", moving * tokens * inputs, f"{moving} layers' inputs on their way to and fro"
        )
        # Forward holds the embeddings and the layer's output too, and its input where that is not kept.
        held = (3 if last_recomputed else 2) * inputs + 2 * shape.intermediate
        yield ledger_part(
            "offloading forward",
            max(0, tokens * held - working),
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
        max(0, loss - working - tokens * again),
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
        groups.setdefault(_input_of(linear), []).append(2 * linear.weights)
    return max(sum(sizes) if sum(sizes) <= STACKED_BYTES else max(sizes) for sizes in groups.values())


def _input_of(linear: Linear) -> str:
    """A name for what ``linear`` is applied to in its layer: the same for those that share it."""
    name = linear.path.rpartition(".")[2]
    return _SHARED_INPUTS.get(name, name)


def element_of(hardware: Hardware) -> tuple[int, str]:
    """Bytes of a number that ``hardware`` computes with, and its dtype's short name."""
    return (4, "fp32") if hardware.arithmetic == "float32" else (2, "bf16")


def linears_activations(shape: ModelShape, recipe: Recipe, setting: Setting) -> Iterator[LedgerPart]:
    """Parts of our products and loss inside transformers' own layers, in bf16."""
    tokens = setting.micro_batch * recipe.data.max_length
    by_layer = [tokens * each for each in _plain_layer_bytes(shape, recipe, 2, folded=True)]
    yield from _kept_by_layers(shape, setting, tokens, by_layer, 2)
    working = _plain_working_bytes(shape, recipe, tokens, 2) + 2 * shape.largest_linear
    if setting.recompute_all:
        working += max(by_layer)
    yield ledger_part(
        "working set", working, "one layer's gradients, a dequantized weight, and what is computed again"
    )
    chunk = min(tokens, LOSS_CHUNK)
    copies = 5 if shape.softcap else 2  # capping keeps its tanh and works on copies
    loss = copies * 2 * chunk * shape.vocab + tokens * (3 * 2 * shape.hidden + 4)
    yield ledger_part(
        "loss",
        max(0, loss - working),
        f"beyond what backward takes later: logits of {chunk:,} tokens {copies} times, last hidden state, "
        "its norm and gradient",
    )


def plain_activations(
    shape: ModelShape, recipe: Recipe, setting: Setting, hardware: Hardware
) -> Iterator[LedgerPart]:
    """Parts of transformers with peft: bf16 autocast (or float32), loss over all logits at once."""
    width, dtype = element_of(hardware)
    tokens = setting.micro_batch * recipe.data.max_length
    by_layer = [tokens * each for each in _plain_layer_bytes(shape, recipe, width)]
    yield from _kept_by_layers(shape, setting, tokens, by_layer, width)
    working = _plain_working_bytes(shape, recipe, tokens, width) + 2 * width * shape.largest_linear
    if setting.recompute_all:
        working += max(by_layer)
    yield ledger_part(
        "working set", working, "one layer's gradients and dequantized weights, and what it computes again"
    )
    if recipe.lora.dora:
        # Those of every layer that is not recomputed, of one that is, and of what is in no layer.
        alive = {*range(setting.recompute_all, shape.layers), 0, None}
        yield ledger_part(
            "DoRA's identities",
            sum(_identity(each, width) for each in place_adapter(shape, recipe.lora) if each.layer in alive),
            "an identity of each module's inputs, and its product with A, kept for the backward pass",
        )
        yield ledger_part(
            "DoRA's weights",
            max(map(_dora_weights, place_adapter(shape, recipe.lora))),
            "one module's update and its sum with the weight, as matrices, to take the rows' lengths of",
        )
    if recipe.lora.new_tokens:
        vocabulary = (shape.vocab + len(recipe.lora.new_tokens)) * shape.hidden
        yield ledger_part(
            "vocabulary copies", 2 * 2 * vocabulary, "the head with its new rows put in, and its gradient"
        )
    logit = 12 + width + (2 * width if shape.softcap else 0)
    capped = ", what caps them" if shape.softcap else ""
    yield ledger_part(
        "loss",
        logit * tokens * shape.vocab,
        f"{logit} B a logit: {dtype}, fp32, its log-softmax and gradient{capped}",
    )
    if hardware.device == "cpu":
        yield ledger_part(
            "allocator",
            _CPU_FRAGMENTATION * sum(by_layer[setting.recompute_all :]),
            "free blocks between saved ones, 30 % of them",
        )


def _kept_by_layers(
    shape: ModelShape, setting: Setting, tokens: int, by_layer: list[int], width: int
) -> Iterator[LedgerPart]:
    """What transformers' layers keep: everything, or their input where they are recomputed."""
    layers = shape.layers - setting.recompute_all
    yield ledger_part(
        "saved activations",
        sum(by_layer[setting.recompute_all :]),
        f"{tokens:,} tokens, {layers} layers of {max(by_layer) // tokens:,} B at most",
    )
    yield ledger_part(
        "saved for recomputing",
        setting.recompute_all * tokens * width * shape.hidden,
        f"{setting.recompute_all} layers of {width * shape.hidden:,} B a token: their input",
    )


def _plain_working_bytes(shape: ModelShape, recipe: Recipe, tokens: int, width: int) -> int:
    """Bytes of one layer's gradients in transformers' own backward."""
    working = tokens * 4 * width * (shape.intermediate + shape.hidden)
    if shape.softcap:
        working += tokens * _SCORE_GRADIENT * shape.heads * recipe.data.max_length
    return working


def _plain_layer_bytes(shape: ModelShape, recipe: Recipe, width: int, *, folded: bool = False) -> list[int]:
    """Bytes a token that autograd saves in each layer of transformers with peft, of ``width`` bytes a number.

    Each LoRA module keeps its own copy of its input and its product with A; the activation keeps gate,
    its value and up; attention keeps query, key and value with the key-value heads repeated, its output and
    its mask (or, where it soft-caps, its scores); each norm keeps its input in fp32. ``folded``: adapters are
    folded into the weights, and linears that share an input keep that alone, once.
    """
    attention = width * 4 * shape.heads * shape.head_dim
    if shape.softcap:
        attention += _SCORE * shape.heads * recipe.data.max_length
    else:
        attention += width * recipe.data.max_length + 4 * shape.heads
    layers = [width * 3 * shape.intermediate + attention + 4 * shape.normed_features] * shape.layers
    seen: set[tuple[int, str]] = set()
    for placed in place_adapter(shape, recipe.lora):
        if placed.layer is None:
            continue
        place = (placed.layer, _input_of(placed.linear))
        layers[placed.layer] += (
            width * placed.linear.inputs if folded else _lora_copies(placed, recipe, width)
        )
        # Nothing is cast in fp32, nor where adapters are folded in: linears that share an input keep it once.
        if (width == 4 or folded) and place in seen:
            layers[placed.layer] -= width * placed.linear.inputs
        seen.add(place)
    if seen and not recipe.lora.new_tokens:  # below the first adapted layer nothing has a gradient
        first = min(layer for layer, _input in seen)
        layers[:first] = [0] * first
    return layers


def _lora_copies(placed: Placed, recipe: Recipe, width: int) -> int:
    mask = 4 * placed.linear.inputs if recipe.lora.dropout else 0
    # DoRA multiplies the base's output and the adapter's by the lengths, and so keeps both.
    dora = 2 * width * placed.linear.outputs if placed.dora else 0
    return width * (placed.linear.inputs + placed.rank) + mask + dora


def _identity(placed: Placed, width: int) -> int:
    """Bytes of what peft multiplies A and B with to have their product as a matrix, and of A's part of it."""
    return width * placed.linear.inputs * (placed.linear.inputs + placed.rank)


def _dora_weights(placed: Placed) -> int:
    """Bytes of peft's temporaries for one module: an identity in fp32, then weight, update and their sum."""
    linear = placed.linear
    return 4 * linear.inputs**2 + (2 + 4 + 4) * linear.weights


def ledger_part(name: str, size: float, formula: str, on: Place = "device") -> LedgerPart:
    """One line of the ledger, its ``size`` rounded to whole bytes."""
    return LedgerPart(name=name, bytes=round(size), formula=formula, on=on)
