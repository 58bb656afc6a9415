"""The planner: how to train a recipe on a machine so that it fits and is as fast as the ledger allows.

Cost model, for the order of settings only and never printed as a speed: a micro-batch takes the
floating-point operations of its products (two a weight and token forward, two backward, two more for what is
computed again) at the device's measured matrix rate, plus one pass over the dequantized weights for each of
these; an optimizer step takes the passage of paged state over the bus; offloading slows everything a little.
Of the settings that fit, the cheapest a token is taken; of equals, the one with the smaller peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from adapterhub.errors import TrainingError
from adapterhub.packaging.manifest import Hardware, Quantization
from adapterhub.trainer.activations import Engine, Optimizer, Setting
from adapterhub.trainer.ledger import GIB, Ledger, ledger
from adapterhub.trainer.placement import adapter_weights
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import ModelShape, shape_of

# Fewer tokens than this at once leave the CPU busy with dequantizing: that costs as much as some 150 tokens'
# products.
CPU_TOKENS = 512
# bf16 matrix products (FLOP/s) and device memory (B/s), by a part of the device's name; the first was
# measured here.
_RATES = {"H200": (790e12, 4.3e12), "H100": (700e12, 2.9e12), "A100": (250e12, 1.7e12)}
_OTHER_RATE = (150e12, 0.8e12)
# Bytes moved to dequantize one NF4 weight: half a byte read, two written, two read by the product.
_DEQUANTIZE_BYTES = 4.5
# Those of a weight that is kept dequantized.
_READ_BYTES = 2.0
# Bytes a second between host and card, each way (PCIe 4, 16 lanes), and what sharing it costs the products.
_BUS = 25e9
_OFFLOAD_SLOWDOWN = 1.02
# Architectures that ``adapterhub.trainer.fast`` has a hand-written layer for.
FAST_TYPES = ("llama", "smollm3", "mistral", "qwen2", "qwen3", "gemma", "phi3")
# transformers' names for the optimizers, as TrainingArguments(optim=…) wants them.
_TRANSFORMERS_OPTIMIZER = {
    "adamw": "adamw_torch",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


@dataclass(frozen=True)
class Choice:
    """One thing the planner decided."""

    name: str
    """Like ``micro-batch``."""
    value: str
    why: str
    """One line."""


@dataclass(frozen=True)
class Remedy:
    """One change that would make a recipe fit that does not."""

    change: str
    """Like ``data.max_length 1024`` or ``a smaller base``."""
    peak_bytes: int
    """Predicted with that change."""


@dataclass(frozen=True)
class Plan:
    """How a recipe is trained on a machine, and whether it fits."""

    shape: ModelShape
    hardware: Hardware
    setting: Setting
    ledger: Ledger
    batch_size: int
    """Rows an optimizer step."""
    reserve_bytes: int
    """Left free for what no ledger knows: other programs, fragmentation."""
    choices: tuple[Choice, ...]
    remedies: tuple[Remedy, ...] = ()
    """What would have to give; empty when the plan fits."""

    @property
    def fits(self) -> bool:
        """Whether the predicted peak, without what the system can take back, leaves the reserve free."""
        needed = self.ledger.predicted_peak_bytes - self.ledger.reclaimable_bytes
        return needed + self.reserve_bytes <= self.hardware.memory_bytes

    @property
    def predicted_peak_bytes(self) -> int:
        """On the device: see ``Ledger.predicted_peak_bytes``."""
        return self.ledger.predicted_peak_bytes

    @property
    def micro_batch(self) -> int:
        """Rows that go through the model at once."""
        return self.setting.micro_batch

    @property
    def accumulation(self) -> int:
        """Micro-batches an optimizer step."""
        return self.batch_size // self.setting.micro_batch

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether transformers itself recomputes the layers; the fast engine does that on its own."""
        return self.setting.engine == "plain" and self.setting.recompute_all > 0

    @property
    def optimizer(self) -> str:
        """transformers' name of the optimizer."""
        return _TRANSFORMERS_OPTIMIZER[self.setting.optimizer]


def default_reserve(hardware: Hardware) -> int:
    """Bytes left free by default: 2 % of a card's memory, 10 % of a host's."""
    return hardware.memory_bytes // (50 if hardware.device == "cuda" else 10)


def plan_for(recipe: Recipe, shape: ModelShape, hardware: Hardware, shards: int = 1) -> Plan:
    """The plan to train with. Raises TrainingError saying what would have to give when nothing fits."""
    made = plan(shape, recipe, hardware, shards=shards)
    if not made.fits:
        raise does_not_fit(made)
    return made


def does_not_fit(made: Plan) -> TrainingError:
    """The error for a plan that does not fit: how much is missing, and what would have to give."""
    peak, memory = made.predicted_peak_bytes - made.ledger.reclaimable_bytes, made.hardware.memory_bytes
    ways = "; or ".join(remedy.change for remedy in made.remedies)
    return TrainingError(
        f"does not fit: {peak / GIB:.1f} GiB are needed at the least, {memory / GIB:.1f} GiB are there, and "
        f"{made.reserve_bytes / GIB:.1f} GiB of them stay in reserve",
        ways or "use a device with more memory",
    )


def plan(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, reserve: int | None = None, *, shards: int = 1
) -> Plan:
    """Choose micro-batch, recomputation and optimizer for ``recipe`` on ``hardware``.

    What the recipe fixes is kept. ``reserve`` bytes stay free (see ``default_reserve``); ``shards`` devices
    hold a part each of base and adapter (FSDP). When nothing fits, the cheapest setting in memory is returned
    with ``fits`` false and ``remedies`` saying what would have to give. Raises RecipeError when the recipe
    targets modules that the shape does not have.
    """
    reserve = default_reserve(hardware) if reserve is None else reserve
    fitting = [
        (setting, found)
        for setting in _candidates(shape, recipe, hardware, reserve, shards)
        for found in [ledger(shape, recipe, hardware, setting)]
        if _room(found, hardware, reserve) >= 0 and _host_holds(found, hardware, setting)
    ]
    if fitting:
        setting, found = min(fitting, key=lambda item: _preference(shape, recipe, hardware, *item))
        return _plan(shape, recipe, hardware, reserve, setting, found)
    setting = _smallest(shape, recipe, hardware, shards)
    made = _plan(shape, recipe, hardware, reserve, setting, ledger(shape, recipe, hardware, setting))
    return replace(made, remedies=tuple(_remedies(made, recipe)))


def engine_for(shape: ModelShape, recipe: Recipe, hardware: Hardware) -> Engine:
    """``fast`` on CUDA for what it has kernels for (see ``why_plain``), else ``plain``."""
    return "fast" if hardware.device == "cuda" and why_plain(shape, recipe, hardware) is None else "plain"


def why_plain(shape: ModelShape, recipe: Recipe, hardware: Hardware) -> str | None:
    """What keeps a run from the fast path on CUDA, in words; None when nothing does."""
    if hardware.count > 1:
        return "the fast path trains on one GPU"
    if recipe.quantization is None or recipe.quantization.type not in ("nf4", "fp4"):
        return "the fast path is for 4-bit bases"
    if shape.model_type not in FAST_TYPES or shape.tower:
        return f"the fast path has no layer for the architecture {shape.model_type}"
    if recipe.lora.dora:
        return "the fast path does not compute DoRA's row lengths"
    if recipe.lora.new_tokens:
        return "the fast path does not train rows of embeddings"
    return None


def _plan(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, reserve: int, setting: Setting, found: Ledger
) -> Plan:
    return Plan(
        shape=shape,
        hardware=hardware,
        setting=setting,
        ledger=found,
        batch_size=recipe.training.batch_size,
        reserve_bytes=reserve,
        choices=tuple(_explain(shape, recipe, hardware, setting, _room(found, hardware, reserve) >= 0)),
    )


def _room(found: Ledger, hardware: Hardware, reserve: int) -> int:
    return hardware.memory_bytes - reserve - (found.predicted_peak_bytes - found.reclaimable_bytes)


def _host_holds(found: Ledger, hardware: Hardware, setting: Setting) -> bool:
    """Offloading is a choice only where the host, taken to have the card's memory at least, holds it all."""
    return not setting.offload or found.host_bytes <= hardware.memory_bytes


def _micro_batches(recipe: Recipe) -> list[int]:
    """What the recipe allows, largest first: whole parts of the batch."""
    fixed, batch = recipe.training.micro_batch, recipe.training.batch_size
    return [fixed] if fixed != "auto" else [rows for rows in range(batch, 0, -1) if batch % rows == 0]


def _optimizers(recipe: Recipe, hardware: Hardware, engine: Engine, shards: int) -> list[Optimizer]:
    wanted = recipe.training.optimizer
    if wanted != "auto":
        return [wanted]
    if hardware.device == "cpu" or shards > 1:
        return ["adamw"]
    return ["adamw", "paged_adamw"] if engine == "fast" else ["paged_adamw"]


def _recomputations(shape: ModelShape, recipe: Recipe, engine: Engine, device: str) -> list[tuple[int, int]]:
    """(layers recomputed whole, layers with the MLP recomputed), fastest first, smallest in memory last."""
    layers, wanted = shape.layers, recipe.training.gradient_checkpointing
    if wanted is True:
        return [(layers, 0)]
    if wanted is False or device == "cpu":
        return [(0, 0)]
    if engine == "plain":
        return [(0, 0), (layers, 0)]
    return [(0, mlp) for mlp in range(layers + 1)] + [
        (whole, layers - whole) for whole in range(1, layers + 1)
    ]


def _candidates(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, reserve: int, shards: int
) -> Iterator[Setting]:
    """For each micro-batch and optimizer the least recomputation that fits; memory falls along the list of
    them.
    """
    engine = engine_for(shape, recipe, hardware)
    steps = _recomputations(shape, recipe, engine, hardware.device)
    for rows in _micro_batches(recipe):
        for optimizer in _optimizers(recipe, hardware, engine, shards):
            for offload in (False, True) if engine == "fast" and steps[-1][0] else (False,):
                settings = [
                    Setting(rows, optimizer, engine, whole, mlp, offload and whole > 0, shards=shards)
                    for whole, mlp in steps
                ]
                least = settings[_first(settings, lambda s: _fits(shape, recipe, hardware, reserve, s))]
                yield least
                kept = _layers_to_keep(shape, recipe, hardware, reserve, least)
                if kept:
                    yield replace(least, kept_weights=kept)


def _layers_to_keep(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, reserve: int, setting: Setting
) -> int:
    """Layers whose dequantized weights fit into what ``setting`` leaves free; none where a step has one
    micro-batch, and where dropout keeps adapters and weights apart.
    """
    one_pass = setting.micro_batch >= recipe.training.batch_size
    if setting.engine != "fast" or one_pass or recipe.lora.dropout:
        return 0
    before, after = (
        ledger(shape, recipe, hardware, replace(setting, kept_weights=kept)).predicted_peak_bytes
        for kept in (0, 1)
    )
    room = hardware.memory_bytes - reserve - before
    return max(0, min(shape.layers, room // (after - before)))


def _fits(shape: ModelShape, recipe: Recipe, hardware: Hardware, reserve: int, setting: Setting) -> bool:
    return _room(ledger(shape, recipe, hardware, setting), hardware, reserve) >= 0


def _first(settings: list[Setting], fits: Callable[[Setting], bool]) -> int:
    """Index of the first setting that fits, by bisection; the last when none does."""
    low, high = 0, len(settings) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(settings[middle]):
            high = middle
        else:
            low = middle + 1
    return low


def _preference(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting, found: Ledger
) -> tuple[float, ...]:
    """Smaller is better."""
    if hardware.device == "cpu":
        tokens = setting.micro_batch * recipe.data.max_length
        return (float(max(0, CPU_TOKENS - tokens)), float(setting.micro_batch))
    return (_seconds_a_token(shape, recipe, hardware, setting), float(found.predicted_peak_bytes))


def _seconds_a_token(shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting) -> float:
    flops, bandwidth = next((rate for name, rate in _RATES.items() if name in hardware.name), _OTHER_RATE)
    weights = sum(linear.weights for linear in shape.linears)  # of one layer
    last = shape.linears[-1].weights  # never computed again: nothing in its layer's backward needs it
    mlp = sum(linear.weights for linear in shape.linears if linear.path.startswith("mlp.")) - last
    again = setting.recompute_all * (weights - last) + setting.recompute_mlp * mlp
    passes = 2 * weights * shape.layers + again  # weights that products go through: forward, backward, again
    tokens = setting.micro_batch * recipe.data.max_length
    spared = setting.kept_weights / shape.layers * (1 - setting.micro_batch / recipe.training.batch_size)
    moved = passes * (_DEQUANTIZE_BYTES * (1 - spared) + _READ_BYTES * spared)
    seconds = 2 * passes / flops + moved / bandwidth / tokens
    if setting.offload:
        seconds *= _OFFLOAD_SLOWDOWN
    if setting.optimizer != "adamw":
        moved = (6 if setting.optimizer == "paged_adamw_8bit" else 12) * adapter_weights(shape, recipe.lora)
        seconds += moved / _BUS / (recipe.training.batch_size * recipe.data.max_length)
    return seconds


def _explain(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting, fits: bool
) -> Iterator[Choice]:
    training = recipe.training
    rows, accumulation = setting.micro_batch, training.batch_size // setting.micro_batch
    if training.micro_batch != "auto":
        why = "as the recipe says"
    elif not fits:
        why = "the smallest there is"
    elif hardware.device == "cpu":
        why = f"the fewest rows that make {CPU_TOKENS} tokens; more would cost memory and gain nothing"
    else:
        why = "the fastest that fits: each weight is dequantized once for all its rows"
    yield Choice("micro-batch", f"{rows} × {recipe.data.max_length} tokens", why)
    yield Choice("accumulation", str(accumulation), f"{training.batch_size} rows an optimizer step")
    yield _explain_recomputation(shape, recipe, hardware, setting, fits)
    if training.optimizer != "auto":
        why = "as the recipe says"
    elif setting.optimizer == "adamw":
        why = "32-bit moments fit beside everything else"
    else:
        why = "32-bit moments that leave the card (paged, QLoRA section 3)"
    yield Choice("optimizer", setting.optimizer, why)
    if hardware.device == "cuda":
        why = why_plain(shape, recipe, hardware) or "fused NF4 and LoRA products"
        yield Choice("engine", setting.engine, why)
    if setting.kept_weights:
        yield Choice(
            "weights kept in bf16",
            f"{setting.kept_weights} of {shape.layers} layers",
            "room is left: those layers are dequantized once an optimizer step, not in each micro-batch",
        )


def _explain_recomputation(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, setting: Setting, fits: bool
) -> Choice:
    whole, mlp = setting.recompute_all, setting.recompute_mlp
    value = "none" if not whole and not mlp else f"{whole} of {shape.layers} layers whole, {mlp} the MLP only"
    if setting.offload:
        value += "; their inputs wait in host memory"
    if recipe.training.gradient_checkpointing != "auto":
        why = "as the recipe says"
    elif hardware.device == "cpu":
        why = "off on the CPU, where time is scarcer than memory"
    elif not whole and not mlp:
        why = "all activations fit"
    else:
        why = "the least that fits at this micro-batch" if fits else "all there is"
    return Choice("recomputation", value, why)


def _smallest(shape: ModelShape, recipe: Recipe, hardware: Hardware, shards: int) -> Setting:
    """The setting with the smallest peak that the recipe allows."""
    engine = engine_for(shape, recipe, hardware)
    whole, mlp = _recomputations(shape, recipe, engine, hardware.device)[-1]
    optimizer = _optimizers(recipe, hardware, engine, shards)[-1]
    return Setting(_micro_batches(recipe)[-1], optimizer, engine, whole, mlp, shards=shards)


def _remedies(made: Plan, recipe: Recipe) -> Iterator[Remedy]:
    """Changes that make it fit, each by itself, each tried on the ledger."""
    for change, changed_shape, changed in _changes(made, recipe):
        setting = _smallest(changed_shape, changed, made.hardware, made.setting.shards)
        found = ledger(changed_shape, changed, made.hardware, setting)
        if _room(found, made.hardware, made.reserve_bytes) >= 0:
            yield Remedy(change, found.predicted_peak_bytes)


def _changes(made: Plan, recipe: Recipe) -> Iterator[tuple[str, ModelShape, Recipe]]:
    shape, hardware, reserve = made.shape, made.hardware, made.reserve_bytes
    shards = made.setting.shards

    def fits(changed: Recipe) -> bool:
        found = ledger(shape, changed, hardware, _smallest(shape, changed, hardware, shards))
        return _room(found, hardware, reserve) >= 0

    training = recipe.training
    if training.micro_batch != "auto":
        yield "training.micro_batch auto", shape, _with(recipe, "training", micro_batch="auto")
    if training.gradient_checkpointing is False:
        yield (
            "training.gradient_checkpointing auto",
            shape,
            _with(recipe, "training", gradient_checkpointing="auto"),
        )
    elif hardware.device == "cpu" and training.gradient_checkpointing == "auto":
        yield (
            "training.gradient_checkpointing true",
            shape,
            _with(recipe, "training", gradient_checkpointing=True),
        )
    if training.optimizer == "adamw" and hardware.device == "cuda":
        yield (
            "training.optimizer paged_adamw_8bit",
            shape,
            _with(recipe, "training", optimizer="paged_adamw_8bit"),
        )
    if recipe.lora.dora:
        yield "lora.dora false", shape, _with(recipe, "lora", dora=False)
    if recipe.quantization is None or recipe.quantization.type == "int8":
        yield "quantization.type nf4", shape, recipe.model_copy(update={"quantization": Quantization()})
    for key, section, field, value in (
        ("data.max_length", "data", "max_length", recipe.data.max_length),
        ("lora.rank", "lora", "rank", recipe.lora.rank),
    ):
        smaller = [value >> shift for shift in range(1, value.bit_length()) if value >> shift >= 8]
        for candidate in smaller:
            changed = _with(recipe, section, **{field: candidate})
            if fits(changed):
                yield f"{key} {candidate}", shape, changed
                break
    for name, smaller_shape in _REFERENCE_SHAPES:
        if smaller_shape.parameters < shape.parameters:
            everywhere = _with(recipe, "lora", target_modules="all-linear", rank_pattern={}, alpha_pattern={})
            found = ledger(
                smaller_shape, everywhere, hardware, _smallest(smaller_shape, everywhere, hardware, shards)
            )
            if _room(found, hardware, reserve) >= 0:
                yield f"a smaller base: LLaMA's {name} shape fits", smaller_shape, everywhere
                break


def _with(recipe: Recipe, section: str, **values: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def _llama(hidden: int, layers: int, heads: int, intermediate: int) -> ModelShape:
    return shape_of(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
            "vocab_size": 32000,
        }
    )


# LLaMA's sizes, largest first (Touvron et al. 2023), and a small one: what a smaller base would be.
_REFERENCE_SHAPES = (
    ("65B", _llama(8192, 80, 64, 22016)),
    ("33B", _llama(6656, 60, 52, 17920)),
    ("13B", _llama(5120, 40, 40, 13824)),
    ("7B", _llama(4096, 32, 32, 11008)),
    ("1B", _llama(2048, 22, 32, 5632)),
    ("135M", _llama(576, 30, 9, 1536)),
)
