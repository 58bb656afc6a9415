"""Where an adapter sits on a model and how large it is there: peft's rules for names, on a shape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from adapterhub.errors import RecipeError
from adapterhub.packaging.adapter import value_for
from adapterhub.trainer.recipe import LoraSection
from adapterhub.trainer.shapes import Linear, ModelShape

_Targets = str | tuple[str, ...]


@dataclass(frozen=True)
class Placed:
    """The adapter on one linear module."""

    linear: Linear
    layer: int | None
    """The text layer's number; None in a vision tower."""
    rank: int
    dora: bool

    @property
    def weights(self) -> int:
        """Trained numbers: r (in + out), and with DoRA the length of each row."""
        lengths = self.linear.outputs if self.dora else 0
        return self.rank * (self.linear.inputs + self.linear.outputs) + lengths


def place_adapter(shape: ModelShape, lora: LoraSection) -> tuple[Placed, ...]:
    """The adapter's place on every module that ``lora`` targets.

    Raises RecipeError naming targets and patterns that match no module: peft would train without them.
    """
    patterns = tuple(lora.rank_pattern.items())
    placed = _place(shape, lora.target_modules, lora.rank, patterns, lora.dora)
    unmatched = [
        pattern for pattern in (*lora.rank_pattern, *lora.alpha_pattern)
        if not any(_ends_in(pattern, name) for name in _names(shape, lora.target_modules))
    ]  # fmt: skip
    if unmatched:
        raise RecipeError(
            f"lora.rank_pattern and alpha_pattern: no adapted module's name ends in {', '.join(unmatched)}",
            "write it as the end of a name like model.layers.0.self_attn.q_proj",
        )
    return placed


def adapter_weights(shape: ModelShape, lora: LoraSection) -> int:
    """Trained numbers of the adapter, without rows of new tokens."""
    return sum(placed.weights for placed in place_adapter(shape, lora))


def token_weights(shape: ModelShape, lora: LoraSection) -> int:
    """Trained numbers in new tokens' rows: of the embeddings, and of a head that is not tied to them."""
    return len(lora.new_tokens) * shape.hidden * (1 if shape.tied else 2)


def largest_rank(shape: ModelShape, lora: LoraSection) -> int:
    """The largest rank on any module."""
    return max(placed.rank for placed in place_adapter(shape, lora))


@lru_cache(maxsize=256)
def _place(
    shape: ModelShape, targets: _Targets, rank: int, patterns: tuple[tuple[str, int], ...], dora: bool
) -> tuple[Placed, ...]:
    by_pattern = dict(patterns)
    return tuple(
        Placed(linear, layer, value_for(by_pattern, name, rank) if by_pattern else rank, dora)
        for name, linear, layer in _adapted(shape, targets)
    )


@lru_cache(maxsize=256)
def _names(shape: ModelShape, targets: _Targets) -> tuple[str, ...]:
    return tuple(name for name, _linear, _layer in _adapted(shape, targets))


def _adapted(shape: ModelShape, targets: _Targets) -> Iterator[tuple[str, Linear, int | None]]:
    found = list(shape.modules())
    if targets == "all-linear":
        yield from found
        return
    wanted = [targets] if isinstance(targets, str) else targets
    meant = _is_matched if isinstance(targets, str) else _is_named
    missing = [target for target in wanted if not any(meant(target, name) for name, _, _ in found)]
    if missing:
        known = ", ".join(dict.fromkeys(linear.path.rpartition(".")[2] for _, linear, _ in found))
        raise RecipeError(
            f"lora.target_modules: {shape.model_type} has no linear module named {', '.join(missing)}",
            f"use all-linear, some of {known}, or a pattern for names like {found[0][0]}",
        )
    yield from (module for module in found if any(meant(target, module[0]) for target in wanted))


def _is_named(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_matched(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def _ends_in(pattern: str, name: str) -> bool:
    return bool(value_for({pattern: True}, name, default=False))
