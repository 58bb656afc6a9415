"""What transformers' own layers hold on the device in one micro-batch, for the ledger: with our products and
loss in them (``linears``), or with peft's (``plain``).

Notation as in ``ledger``: T tokens, h hidden, i intermediate, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from adapterhub.packaging.evidence import LedgerPart
from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.activations import LOSS_CHUNK, Setting, element_of, input_of, ledger_part
from adapterhub.trainer.placement import Placed, place_adapter
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import ModelShape

# Measured on the CPU: free blocks that the C allocator keeps between the tensors that backward needs.
_CPU_FRAGMENTATION = 0.30
# Bytes of a soft-capped score, one a head and pair of tokens: its tanh, its softmax in fp32, and in bf16 that
# again as the product takes it; and in backward the gradients of these. Autograd gives up some of the values
# before their gradients are all there: what was measured on an H200 is less than the sum.
_SCORE = 8
_SCORE_GRADIENT = 12
_SCORE_GRADIENT_MEASURED = 10


def linears_activations(shape: ModelShape, recipe: Recipe, setting: Setting) -> Iterator[LedgerPart]:
    """Parts of our products and loss inside transformers' own layers, in bf16.

    What is saved was listed by autograd's hooks on an H200, and agrees with the peaks measured there
    (benchmarks/results/ledger_accuracy.json).
    """
    tokens = setting.micro_batch * recipe.data.max_length
    by_layer = [tokens * each for each in _linears_layer_bytes(shape, recipe)]
    yield from _kept_by_layers(shape, setting, tokens, by_layer, 2)
    pair = 2 if shape.softcap else 1
    yield ledger_part(
        "shared by layers",
        tokens * (2 * pair * recipe.data.max_length + 2 * 2 * 2 * shape.head_dim),
        f"two masks of {pair} B a pair of tokens, two tables of rotary angles",
    )
    width = _product_width(recipe)
    again = max(by_layer) if setting.recompute_all else 0
    working = again + max(0, _mlp_working(shape, recipe, tokens), _attention_working(shape, recipe, tokens))
    yield ledger_part("working set", working, "one layer's gradients, and what is computed again for them")
    yield ledger_part(
        "dequantized weight",
        2 * width * shape.largest_linear,
        f"the largest linear's, {width} B a weight; and as much again, measured",
    )
    chunk = min(tokens, LOSS_CHUNK)
    copies = 4 if shape.softcap else 2  # capping keeps its tanh and works on copies
    loss = copies * 2 * chunk * shape.vocab + tokens * 6 * 2 * shape.hidden
    yield ledger_part(
        "loss",
        max(0, loss - working),
        f"beyond what backward takes later: logits of {chunk:,} tokens {copies} times, embeddings, last "
        "hidden state, its norm in fp32 and gradient",
    )


def _linears_layer_bytes(shape: ModelShape, recipe: Recipe) -> list[int]:
    """Bytes a token that autograd saves in each layer around our products.

    The activation keeps gate, its value and up; attention keeps query, key and value with the key-value heads
    repeated (one head is not copied for that), and its mask in bf16 and log-sum-exp (or, where it soft-caps,
    its scores); each norm keeps its input in fp32; each adapted product keeps its input, those that share one
    once. Attention that does not soft-cap keeps its output, too: the last product's input, adapted or not.
    """
    repeated = shape.heads if shape.kv_heads > 1 or shape.softcap else 1
    attention = 2 * (shape.heads + 2 * repeated) * shape.head_dim
    if shape.softcap:
        attention += _SCORE * shape.heads * recipe.data.max_length
    else:
        attention += 2 * recipe.data.max_length + 4 * shape.heads
    output = {} if shape.softcap else {"o_proj": 2 * shape.heads * shape.head_dim}
    inputs: dict[int, dict[str, int]] = {}
    for placed in place_adapter(shape, recipe.lora):
        if placed.layer is not None:
            inputs.setdefault(placed.layer, {**output})[input_of(placed.linear)] = 2 * placed.linear.inputs
    each = 2 * 3 * shape.intermediate + attention + 4 * shape.normed_features
    first = min(inputs, default=0)  # below the first adapted layer nothing has a gradient
    return [
        each + sum(inputs.get(layer, output).values()) if layer >= first else 0
        for layer in range(shape.layers)
    ]


def _mlp_working(shape: ModelShape, recipe: Recipe, tokens: int) -> int:
    """Bytes in the backward of a layer's MLP: the product's gradient and those of its two factors, less the
    product itself and what a norm after it kept, which are given up before; and the residual's. Not
    measured: what masks of dropout and copies in float32 add.
    """
    each = 2 * (2 * shape.intermediate + shape.hidden) - 4 * _norms_after(shape) * shape.hidden
    if recipe.lora.dropout:
        each += 7 * shape.intermediate  # a mask as it is drawn, compared and scaled
    if _product_width(recipe) == 4:
        each += 2 * 4 * (shape.intermediate + shape.hidden)  # a product's input and output, or gradients
    return tokens * each


def _product_width(recipe: Recipe) -> int:
    """Bytes of a number that our products compute with."""
    in_float32 = recipe.quantization is not None and recipe.quantization.compute_dtype == "float32"
    return 4 if in_float32 else 2


def _attention_working(shape: ModelShape, recipe: Recipe, tokens: int) -> int:
    """Bytes in the backward of a layer's attention, less what the MLP kept and its backward gave up."""
    norms = 1 + _norms_after(shape)
    given_up = 2 * (4 * shape.intermediate + shape.hidden) + 4 * norms * shape.hidden
    gradients = 2 * (2 * shape.hidden + 4 * shape.heads * shape.head_dim)
    if shape.softcap:
        gradients += _SCORE_GRADIENT_MEASURED * shape.heads * recipe.data.max_length
    return tokens * (gradients - given_up)


def _norms_after(shape: ModelShape) -> int:
    """Norms that follow a layer's MLP: one in Gemma 2 and 3, which have four over ``hidden`` a layer."""
    return 1 if shape.layer_norm_weights >= 4 * shape.hidden else 0


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


def _plain_layer_bytes(shape: ModelShape, recipe: Recipe, width: int) -> list[int]:
    """Bytes a token that autograd saves in each layer of transformers with peft, of ``width`` bytes a number.

    Each LoRA module keeps its own copy of its input and its product with A; the activation keeps gate,
    its value and up; attention keeps query, key and value with the key-value heads repeated, its output and
    its mask (or, where it soft-caps, its scores); each norm keeps its input in fp32.
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
        place = (placed.layer, input_of(placed.linear))
        layers[placed.layer] += _lora_copies(placed, recipe, width)
        if width == 4 and place in seen:  # nothing is cast in fp32: linears that share an input keep it once
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
