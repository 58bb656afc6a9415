"""Causal attention over packed rows: sequences one after the other, none of which sees another."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

_FLASH_FORWARD = torch.ops.aten._flash_attention_forward.default
_FLASH_BACKWARD = torch.ops.aten._flash_attention_backward.default
_CUDNN_FORWARD = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_CUDNN_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
# cuDNN plans anew for every shape, so it only gets long sequences of lengths that come again.
_CUDNN_LENGTHS = 256


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a flattened batch of T tokens begin and end."""

    starts: torch.Tensor
    """int32, (sequences + 1), on the device: 0, the length of the first, …, T."""
    longest: int
    """Tokens of the longest; known on the host, so that no kernel waits for it."""

    @property
    def count(self) -> int:
        """How many there are."""
        return self.starts.shape[0] - 1


@dataclass(frozen=True)
class Kept:
    """What attention's backward needs beside query, key and value."""

    out: torch.Tensor
    """(T, heads, head_dim)."""
    log_sum_exp: torch.Tensor
    """float32, (heads, T)."""
    state: tuple[torch.Tensor, torch.Tensor] | None
    """The kernel's own random state, unused without dropout."""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, scale: float, window: int | None
) -> Kept:
    """Softmax(scale · q kᵀ) v within each sequence, each token seeing itself and those before it.

    ``q`` (T, heads, head_dim), ``k`` and ``v`` (T, kv heads, head_dim); ``window`` tokens back at most,
    itself included, if given. On CUDA by torch's flash attention for variable lengths, or by cuDNN's where
    that is faster; on the CPU in float32.
    """
    if not q.is_cuda:
        return Kept(_attend_plainly(q, k, v, sequences, scale, window), torch.empty(0), None)
    if _equal(q, sequences, window):
        rows = (_rows(tensor, sequences) for tensor in (q, k, v))
        out, log_sum_exp, _, _, _, _, seed, offset, _ = _CUDNN_FORWARD(
            *rows, None, True, 0.0, True, False, scale=scale
        )
        return Kept(out.transpose(1, 2).flatten(0, 1), log_sum_exp, (seed, offset))
    left = _left(window, sequences)
    out, log_sum_exp, state, unused, _ = _FLASH_FORWARD(
        q, k, v, sequences.starts, sequences.starts, sequences.longest, sequences.longest,
        0.0, True, False, scale=scale, window_size_left=left, window_size_right=None if left is None else 0,
    )  # fmt: skip
    return Kept(out, log_sum_exp, (state, unused))


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: Kept,
    sequences: Sequences,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, given that of the output (T, heads, head_dim)."""
    if kept.state is None:
        with torch.enable_grad():
            q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
            out = _attend_plainly(q, k, v, sequences, scale, window)
        grad_q, grad_k, grad_v = torch.autograd.grad(out, (q, k, v), grad)
        return grad_q, grad_k, grad_v
    if _equal(q, sequences, window):
        rows = [_rows(tensor, sequences) for tensor in (grad, q, k, v, kept.out)]
        seed, offset = kept.state
        grads = _CUDNN_BACKWARD(
            *rows, kept.log_sum_exp, seed, offset, None, None, None, sequences.longest, sequences.longest,
            0.0, True, scale=scale,
        )  # fmt: skip
        grad_q, grad_k, grad_v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in grads)
        return grad_q, grad_k, grad_v
    left = _left(window, sequences)
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _FLASH_BACKWARD(
        grad, q, k, v, kept.out, kept.log_sum_exp, sequences.starts, sequences.starts,
        sequences.longest, sequences.longest, 0.0, True, *kept.state,
        scale=scale, window_size_left=left, window_size_right=None if left is None else 0,
    )  # fmt: skip
    return gradients


def sequences_of(position_ids: torch.Tensor) -> Sequences:
    """The sequences of a batch whose positions (rows, T) begin again at 0 with each; call it on the CPU."""
    flat = position_ids.reshape(-1)
    begins = torch.nonzero(flat == 0).view(-1).to(torch.int32)
    starts = torch.cat((begins, torch.tensor([flat.numel()], dtype=torch.int32)))
    return Sequences(starts, int((starts[1:] - starts[:-1]).max()))


def _equal(q: torch.Tensor, sequences: Sequences, window: int | None) -> bool:
    """Whether cuDNN's kernels for equally long sequences do it: on Hopper they are faster than flash
    attention 2.
    """
    return (
        sequences.count * sequences.longest == q.shape[0]
        and sequences.longest % _CUDNN_LENGTHS == 0
        and q.shape[2] in (64, 128)
        and _left(window, sequences) is None
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )


def _rows(tensor: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """(T, heads, head_dim) as (sequences, heads, longest, head_dim), a view."""
    return tensor.unflatten(0, (sequences.count, sequences.longest)).transpose(1, 2)


def _left(window: int | None, sequences: Sequences) -> int | None:
    """Tokens back that the kernel may look, or None when the window is wider than every sequence."""
    return None if window is None or window >= sequences.longest else window - 1


def _attend_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, scale: float, window: int | None
) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    bounds = sequences.starts.tolist()
    parts = []
    for start, stop in pairwise(bounds):
        query = q[start:stop].float().transpose(0, 1)
        key, value = (t[start:stop].float().transpose(0, 1).repeat_interleave(groups, 0) for t in (k, v))
        back = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        hidden = (back < 0) | (back >= (window or stop))
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        parts.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(parts).to(q.dtype)
