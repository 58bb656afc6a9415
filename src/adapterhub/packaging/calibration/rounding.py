"""Choosing 4-bit codes so that a linear layer's output changes least, its scales held fixed.

Minimised is tr((Q − T) H (Q − T)ᵀ) over the codes of Q, with T the wanted weights (out, in) and
H = Xᵀ·X (in, in) of the layer's inputs. First GPTQ's error feedback (https://arxiv.org/abs/2210.17323,
algorithm 1, inputs with the most energy first): each column is rounded to the nearest code and its error is
made up for by the columns that are still open. Then sweeps of coordinate descent, which give each code its
best value beside all others, until little changes: no sweep makes it worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub.packaging.layout import BLOCK, quantize_scales

if TYPE_CHECKING:
    import torch

DAMPING = 0.01
"""Share of the mean diagonal that is added to H's diagonal, GPTQ's own."""
# Columns whose changes are carried over to the others in one product.
_COLUMNS = 64
# A step works on a column of so many numbers: fewer are sooner done on the CPU than a GPU's kernels start.
_MANY_ROWS = 4096
_SWEEPS = 4
# A sweep that gains less than this share of the error is the last.
_ENOUGH = 0.01


@dataclass(frozen=True)
class Grid:
    """The values that 4-bit codes stand for."""

    values: torch.Tensor
    """Ascending and distinct, float32 (at most 16,)."""
    codes: torch.Tensor
    """The code of each, uint8."""
    by_code: torch.Tensor
    """The value of each code, float32 (16,): as bitsandbytes has it."""
    between: torch.Tensor
    """Half way from each value to the next."""

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """The place in ``values`` of the one nearest to each number, int64."""
        import torch

        return torch.bucketize(numbers, self.between)

    def to(self, device: torch.device) -> Grid:
        """The same on ``device``."""
        return Grid(*(part.to(device) for part in (self.values, self.codes, self.by_code, self.between)))


def read_grid(kind: str, device: str = "cpu") -> Grid:
    """bitsandbytes' own values of ``nf4`` or ``fp4``."""
    import torch
    from bitsandbytes import functional as bnb

    by_code = bnb.get_4bit_type(kind, device=device).to(torch.float32)
    values, codes = torch.sort(by_code, stable=True)
    # fp4 has a zero of each sign: one will do.
    keep = torch.cat([torch.ones(1, dtype=torch.bool, device=device), values[1:] != values[:-1]])
    values = values[keep].contiguous()
    return Grid(values, codes[keep].to(torch.uint8), by_code, (values[1:] + values[:-1]) / 2)


def stored_scales(scales: torch.Tensor) -> torch.Tensor:
    """What ``scales`` (float32, one a block) are after double quantization, as a loaded model has them."""
    from bitsandbytes import functional as bnb

    codes, nested, offset, values = quantize_scales(scales)
    decoded = bnb.dequantize_blockwise(codes, absmax=nested, code=values, blocksize=256)
    return decoded + offset


def pack(places: torch.Tensor, grid: Grid) -> torch.Tensor:
    """bitsandbytes' bytes for places on the grid (any shape, an even number): uint8 (n / 2, 1)."""
    codes = grid.codes[places.reshape(-1)]
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes in bitsandbytes' bytes, int64, flat: the first of a pair is in the high half."""
    import torch

    flat = packed.reshape(-1).long()
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)


def block_scales(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The largest absolute value of each block of 64, float32 on the CPU."""
    from bitsandbytes import functional as bnb

    flat = weight.contiguous().view(-1)
    _codes, state = bnb.quantize_4bit(flat, blocksize=BLOCK, compress_statistics=False, quant_type=kind)
    return state.absmax.cpu()


def spread(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The scale of each weight, float32 of ``shape``; blocks run along the flattened weight."""
    rows, columns = shape
    return scales.repeat_interleave(BLOCK)[: rows * columns].view(rows, columns)


def aim(weight: torch.Tensor, hessian: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """The weights that bring the layer's outputs nearest to the wanted ones with the inputs that it gets.

    W + M·H⁻¹ (float32 (out, in)): M = Σ (y − W·x̃)·x̃ᵀ is what its outputs lack, H = Σ x̃·x̃ᵀ, damped.
    """
    import torch

    factor = torch.linalg.cholesky(damp(hessian))
    return weight + torch.cholesky_solve(missing.T, factor).T


def output_error(found: torch.Tensor, wanted: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((Q − T) H (Q − T)ᵀ): the squared change of the layer's outputs over all calibration tokens."""
    difference = found - wanted
    return float(((difference @ hessian) * difference).double().sum())


def choose_codes(
    wanted: torch.Tensor, hessian: torch.Tensor, steps: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Places on ``grid`` (out, in), int64, such that ``grid.values[places] * steps`` changes outputs least.

    ``wanted`` and ``steps``, the scale of each weight, are float32 (out, in); ``hessian`` is float32 (in, in)
    and is damped here.
    """
    import torch

    damped = damp(hessian)
    order = torch.argsort(damped.diagonal(), descending=True)
    damped = damped[order][:, order].contiguous()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    there = torch.device("cpu") if wanted.shape[0] < _MANY_ROWS else wanted.device
    # A column of the weight as a row: what one step works on lies together.
    work = (wanted.T[order].contiguous().to(there), steps.T[order].contiguous().to(there), grid.to(there))
    places = _feed_errors(upper.to(there), *work)
    _descend(places, damped.to(there), *work)
    result = torch.empty_like(places)
    result[order.to(there)] = places
    return result.T.contiguous().to(wanted.device)


def damp(hessian: torch.Tensor) -> torch.Tensor:
    """H with a small diagonal added, so that it has an inverse though inputs are always zero."""
    import torch

    extra = DAMPING * hessian.diagonal().mean().clamp_min(1e-12)
    return hessian + extra * torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)


def _feed_errors(upper: torch.Tensor, wanted: torch.Tensor, steps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """GPTQ: an error e in column j moves column k by e·U_jk/U_jj, U being the upper Cholesky factor of H⁻¹.

    A column of the weight is a row here: ``wanted``, ``steps`` and the result are (in, out).
    """
    import torch

    work = wanted.clone()
    places = torch.empty(wanted.shape, dtype=torch.int64, device=wanted.device)
    errors = torch.empty((_COLUMNS, wanted.shape[1]), device=wanted.device)
    pivots = upper.diagonal().tolist()
    for start in range(0, len(pivots), _COLUMNS):
        end = min(start + _COLUMNS, len(pivots))
        for column in range(start, end):
            chosen = grid.nearest(work[column] / steps[column])
            places[column] = chosen
            error = torch.addcmul(work[column], grid.values[chosen], steps[column], value=-1)
            errors[column - start] = error.div_(pivots[column])
            work[column:end].addr_(upper[column, column:end], error, alpha=-1)
        work[end:].addmm_(upper[start:end, end:].T, errors[: end - start], alpha=-1)
    return places


def _descend(
    places: torch.Tensor, hessian: torch.Tensor, wanted: torch.Tensor, steps: torch.Tensor, grid: Grid
) -> None:
    """Sweep over the columns in place, each code the best beside the others; all are (in, out)."""
    difference = grid.values[places] * steps - wanted
    gradient = hessian @ difference
    before = float((gradient * difference).double().sum())
    for _sweep in range(_SWEEPS):
        _sweep_once(places, difference, gradient, hessian, steps, grid)
        gradient = hessian @ difference
        after = float((gradient * difference).double().sum())
        if before - after <= _ENOUGH * before:
            return
        before = after


def _sweep_once(
    places: torch.Tensor,
    difference: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    steps: torch.Tensor,
    grid: Grid,
) -> None:
    """One sweep; ``difference`` is Q − T and is kept so, ``gradient`` H·(Q − T) only where it is needed."""
    import torch

    pivots = hessian.diagonal().tolist()
    for start in range(0, len(pivots), _COLUMNS):
        end = min(start + _COLUMNS, len(pivots))
        before = difference[start:end].clone()
        local = gradient[start:end]
        for column in range(start, end):
            now = grid.values[places[column]] * steps[column]
            best = torch.add(now, local[column - start], alpha=-1 / pivots[column])
            chosen = grid.nearest(best.div_(steps[column]))
            change = torch.addcmul(now.neg_(), grid.values[chosen], steps[column])
            places[column] = chosen
            difference[column] += change
            local.addr_(hessian[column, start:end], change)
        gradient[end:].addmm_(hessian[end:, start:end], difference[start:end] - before)
