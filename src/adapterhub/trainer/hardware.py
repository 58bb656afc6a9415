"""The machine to train on: the CUDA device when torch sees one, else the processor and its memory."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from adapterhub.errors import RecipeError
from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.arithmetic import arithmetic_of
from adapterhub.trainer.ranks import local_rank, local_world_size, world_size

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)\s*$", re.IGNORECASE)
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def detect_hardware() -> Hardware:
    """This process's CUDA device, the first that torch sees or that of its rank; or else its part of this
    machine's memory.
    """
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(local_rank())
        return Hardware(
            device="cuda", name=properties.name, memory_bytes=properties.total_memory, count=world_size()
        )
    return Hardware(
        device="cpu",
        name=_processor(),
        memory_bytes=_host_memory() // local_world_size(),
        count=_cores(),
        arithmetic=arithmetic_of("cpu"),
    )


def described_gpu(memory_bytes: int) -> Hardware:
    """A CUDA card that is not here, known by its memory only."""
    return Hardware(device="cuda", name="a GPU", memory_bytes=memory_bytes)


def parse_size(text: str) -> int:
    """Bytes in a size like ``48GiB``, ``24GB`` or ``80g`` (GB is 10^9 bytes; GiB and a bare g are 2^30).

    Raises RecipeError for anything else: a number without its unit, and sizes of nothing.
    """
    match = _SIZE.match(text)
    if match:
        number, prefix, binary = match.groups()
        decimal = bool(prefix) and not binary and text.strip().lower().endswith("b")
        base = 1000 if decimal else 1024
        size = round(float(number) * base ** ("kmgt".index(prefix.lower()) + 1 if prefix else 0))
        if 0 < size < 2**60:
            return size
    raise RecipeError(f"{text!r} is not a size of memory", "write it like 48GiB, 24GB or 80g")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit if that is
    lower.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in map(Path, _CGROUP_LIMITS):
        if limit.is_file() and limit.read_text().strip().isdigit():
            memory = min(memory, int(limit.read_text()))
    return memory
