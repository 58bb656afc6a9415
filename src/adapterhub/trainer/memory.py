"""Running out of memory: the many ways in which libraries say it."""

from __future__ import annotations

# torch's allocator on the CPU, the CUDA driver (pinned memory, kernels' own), cuBLAS for its workspace, and
# Triton as it loads a kernel.
_WORDS = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(err: BaseException) -> bool:
    """Whether ``err`` says that the device or the host has no memory left."""
    import torch

    if isinstance(err, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(err, RuntimeError) and any(words in str(err) for words in _WORDS)


def first_line(err: BaseException) -> str:
    """The first line of its message, cut to what a record holds."""
    return (str(err).strip() or "out of memory").splitlines()[0][:200]
