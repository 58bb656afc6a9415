"""The nearest matrix of a rank, plain or as seen through a layer's inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DAMPING = 0.01
"""Share of the mean diagonal that is added to a second moment's diagonal: inputs that calibration text did
not show are not free."""


def nearest_of_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, rank) and A (rank, in), whose product is the rank-``rank`` matrix nearest to ``matrix`` (out,
    in), float32; by the eigenvectors of its smaller Gram matrix, which takes a fraction of an SVD's time.

    Both hold the square roots of the singular values, so that neither learns faster than the other.
    """
    import torch

    if matrix.shape[0] > matrix.shape[1]:
        a, b = nearest_of_rank(matrix.t(), rank)
        return b.t(), a.t()
    _, vectors = torch.linalg.eigh(matrix @ matrix.t())
    left = vectors[:, -rank:]  # (out, rank), of the largest singular values
    right = left.t() @ matrix  # (rank, in): singular value times right vector
    roots = torch.linalg.vector_norm(right, dim=1).clamp_min(1e-30).sqrt()
    return left * roots, right / roots[:, None]


def root_of_moment(moment: torch.Tensor) -> torch.Tensor:
    """L with L·Lᵀ = H, lower triangular (in, in), of a second moment H = E[x·xᵀ], damped; float32.

    ‖D·L‖ (Frobenius) is the root mean square of ‖D·x‖ over the inputs that H was summed over.
    """
    import torch

    damped = moment.clone()
    damped.diagonal().add_(_DAMPING * moment.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.cholesky(damped)


def nearest_for_inputs(
    matrix: torch.Tensor, rank: int, root: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, rank) and A (rank, in) that minimise ‖(matrix − B·A)·root‖, float32.

    ``root`` is ``root_of_moment``'s. By truncating the singular values of matrix·L, of which A is the right
    factor times L⁻¹ (as in SVD-LLM, https://arxiv.org/abs/2403.07378, section 3.1).
    """
    import torch

    b, a = nearest_of_rank(matrix @ root, rank)
    return b, torch.linalg.solve_triangular(root, a, upper=False, left=False)
