"""How far two adapters are apart, layer by layer, in what they add to the base's weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub.packaging.adapter import Adapter, LoraPair
from adapterhub.packaging.tensors import read_tensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerDelta:
    """The updates s·B·A that two adapters make to one layer."""

    module: str
    """Dotted name in the base."""
    norm_a: float
    """Frobenius norm of A's update; 0 where A leaves the layer alone."""
    norm_b: float
    delta: float | None
    """Frobenius norm of B's update less A's; None when the two are of different shapes."""

    @property
    def relative(self) -> float | None:
        """``delta`` as a share of ``norm_a``; None without either, or when A changes nothing there."""
        return self.delta / self.norm_a if self.delta is not None and self.norm_a else None


def layer_deltas(a: Adapter, b: Adapter) -> Iterator[LayerDelta]:
    """The difference of two adapters in each layer that either changes, one layer in memory at a time.

    The difference is itself a product of thin factors, [sB·B_B, −sA·B_A]·[A_B; A_A].
    With the R factors of their QR decompositions, ‖P·Q‖ = ‖R_P·R_Qᵀ‖ (float64), so nothing of the weight's
    own size is made. A layer with NaN or infinite values has NaN for its norms.
    """
    for module in dict.fromkeys([*a.pairs, *b.pairs]):
        ours, theirs = a.pairs.get(module), b.pairs.get(module)
        left, right = _factors(a, ours), _factors(b, theirs)
        norm_a, norm_b = _norm(left), _norm(right)
        if left is None or right is None:
            delta: float | None = norm_b if left is None else norm_a
        elif not _are_alike(ours, theirs):
            delta = None
        else:
            delta = _norm(_subtract(right, left))
        yield LayerDelta(module, norm_a, norm_b, delta)


def _factors(adapter: Adapter, pair: LoraPair | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """s·B (out, rank) and A (rank, in) in float64."""
    if pair is None:
        return None
    import torch

    a, b = (read_tensor(adapter.file, entry).to(torch.float64) for entry in (pair.a, pair.b))
    return pair.scale * b, a


def _subtract(
    right: tuple[torch.Tensor, torch.Tensor], left: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    return torch.cat([right[0], -left[0]], dim=1), torch.cat([right[1], left[1]], dim=0)


def _norm(factors: tuple[torch.Tensor, torch.Tensor] | None) -> float:
    """The Frobenius norm of a product of thin factors."""
    if factors is None:
        return 0.0
    import torch

    b, a = factors
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.nan
    left, right = (torch.linalg.qr(factor, mode="r").R for factor in (b, a.T))
    return float(torch.linalg.norm(left @ right.T))


def _are_alike(a: LoraPair | None, b: LoraPair | None) -> bool:
    return (
        a is not None and b is not None and (a.out_features, a.in_features) == (b.out_features, b.in_features)
    )
