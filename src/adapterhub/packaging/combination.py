"""Several adapters as one: PEFT's ways to combine their factors, module by module, repeatable.

The ways and their formulas are those of PEFT's ``add_weighted_adapter``: ``cat`` is the exact weighted sum of
the adapters' updates; the others work on A and on B each, weighted by the root of weight times scale:
``linear`` adds, TIES (https://arxiv.org/abs/2306.01708) prunes the smallest and elects signs, DARE
(https://arxiv.org/abs/2311.03099) prunes at random and rescales.
"""

from __future__ import annotations

import json
import math
import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from adapterhub.errors import RecipeError, ReleaseError
from adapterhub.packaging.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, AdapterConfig, LoraPair

if TYPE_CHECKING:
    import torch

Combine = Literal["cat", "linear", "ties", "dare_linear", "dare_ties"]
PRUNING: tuple[Combine, ...] = ("ties", "dare_linear", "dare_ties")

# torch draws from one generator of the process: one module at a time.
_DRAWING = threading.Lock()


@dataclass(frozen=True)
class CombinedPair:
    """The factors that stand for several adapters' on one module; they hold scales and weights already."""

    module: str
    in_features: int
    out_features: int
    transposed: bool
    """The base stores the weight as (in, out), as far as the first adapter's settings tell."""
    scale: float = 1.0


@dataclass(frozen=True)
class CombinedAdapter:
    """Adapters of the same base and their weights."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    combine: Combine
    density: float
    """The share of numbers that pruning keeps."""
    seed: int
    """What DARE draws from, with the module's name: the order of modules does not matter."""
    pairs: dict[str, CombinedPair]

    @property
    def config(self) -> AdapterConfig:
        """The first adapter's: what was checked is the same in all."""
        return self.adapters[0].config

    @property
    def folder(self) -> Path:
        return self.adapters[0].folder

    def load_pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) of one module in float32; see ``Adapter.load_pair``."""
        parts = [
            (adapter.load_pair(module), weight * adapter.pairs[module].scale)
            for adapter, weight in zip(self.adapters, self.weights, strict=True)
            if module in adapter.pairs
        ]
        if self.combine == "cat":
            import torch

            return (
                torch.cat([a * weight for (a, _b), weight in parts]),
                torch.cat([b for (_a, b), _weight in parts], dim=1),
            )
        with _DRAWING:
            return self._mix(module, parts)

    def _mix(
        self, module: str, parts: Sequence[tuple[tuple[torch.Tensor, torch.Tensor], float]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch
        from peft.utils import merge_utils

        roots = [math.sqrt(abs(weight)) for _factors, weight in parts]
        signed = [math.copysign(root, weight) for root, (_factors, weight) in zip(roots, parts, strict=True)]
        mix = getattr(merge_utils, "task_arithmetic" if self.combine == "linear" else self.combine)
        more = [] if self.combine == "linear" else [self.density]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a density of 1, for each module
            torch.manual_seed(int.from_bytes(sha256(f"{self.seed} {module}".encode()).digest()[:8]) >> 1)
            a = mix([a for (a, _b), _weight in parts], torch.tensor(signed), *more)
            b = mix([b for (_a, b), _weight in parts], torch.tensor(roots), *more)
        return a, b


def combine_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    combine: Combine = "cat",
    density: float = 1.0,
    seed: int = 0,
) -> CombinedAdapter:
    """One adapter of several. A module that not all adapt gets what those that do give it.

    Raises RecipeError for weights or a density that make no sense, ReleaseError when an adapter holds more
    than factors of linear layers, or when they differ in rank where the way needs one rank.
    """
    assert combine in get_args(Combine)
    if not all(math.isfinite(weight) and weight != 0 for weight in weights):
        raise RecipeError("an adapter's weight is zero or not a number", "weigh each by a number like 0.5")
    if not 0 < density <= 1:
        raise RecipeError(f"a density of {density} keeps no share of anything", "choose one in (0, 1]")
    if combine not in PRUNING and density != 1:
        raise RecipeError(f"{combine} prunes nothing, so it has no density", "leave --density out")
    for adapter in adapters:
        obstacles = adapter.config.obstacles()
        if obstacles or adapter.others or not adapter.pairs:
            more = "; ".join(obstacles) or ", ".join(adapter.others[:3]) or "nothing to add"
            raise ReleaseError(
                f"{adapter.folder} has more than factors of linear layers, which cannot be combined: {more}",
                "merge it alone",
            )
    pairs = {}
    for module in sorted({module for adapter in adapters for module in adapter.pairs}):
        found = [adapter.pairs[module] for adapter in adapters if module in adapter.pairs]
        pairs[module] = _combined(module, found, combine)
    return CombinedAdapter(tuple(adapters), tuple(weights), combine, density, seed, pairs)


def write_combined(combined: CombinedAdapter, folder: Path) -> None:
    """Write ``combined`` to ``folder``, which exists, as one plain PEFT adapter: scales and weights inside.

    Raises ReleaseError when a factor holds NaN or infinite values.
    """
    from safetensors.torch import save_file

    factors = {}
    ranks = {}
    for module in combined.pairs:
        a, b = combined.load_pair(module)
        ranks[module] = a.shape[0]
        for side, factor in (("A", a), ("B", b)):
            factors[f"base_model.model.{module}.lora_{side}.weight"] = factor.contiguous()
    most = max(ranks.values())
    # A scale of 1 for each: alpha is the rank.
    own = {re.escape(module): rank for module, rank in ranks.items() if rank != most}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": own,
        "alpha_pattern": own,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": combined.config.fan_in_fan_out,
    }
    save_file(factors, folder / WEIGHTS_NAME, {"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _combined(module: str, found: Sequence[LoraPair], combine: Combine) -> CombinedPair:
    first = found[0]
    shapes = {(pair.in_features, pair.out_features) for pair in found}
    if len(shapes) > 1:
        raise ReleaseError(
            f"the adapters' factors on {module!r} are for layers of different shapes",
            "combine adapters of the same base",
        )
    ranks = sorted({pair.rank for pair in found})
    if combine != "cat" and len(ranks) > 1:
        raise ReleaseError(
            f"the adapters' ranks on {module!r} are {', '.join(map(str, ranks))}; {combine} needs one rank",
            "use --combine cat, which adds updates of any rank",
        )
    return CombinedPair(module, first.in_features, first.out_features, first.transposed)
