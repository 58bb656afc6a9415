"""The process that opens a pickle of tensors: weights-only, with limits, and with nothing of ours in reach.

Started by its path with ``python -I``, it takes the pickle, the file to write and two limits in bytes (memory
beyond what torch itself takes, and output), and prints one JSON object: ``tensors`` (how many), or ``error``.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

CPU_SECONDS = 300


def _limit(memory: int, output: int) -> None:
    import resource

    with suppress(OSError, ValueError):  # Linux alone tells what is mapped; macOS knows no such limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory += pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (output, output))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def take_tensors(source: str, target: str, limit: int) -> dict[str, object]:
    """Write the tensors that a pickle holds by name, ``limit`` bytes at most; returns what is printed."""
    import torch
    from safetensors.torch import save_file

    held: Any = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(held, dict) or not held:
        return {"error": f"it holds a {type(held).__name__}, not tensors by name"}
    size = 0
    for name, value in held.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            return {"error": f"{name!r} is a {type(value).__name__}, not a tensor by name"}
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            return {"error": f"{name!r} is no plain tensor"}
        size += value.numel() * value.element_size()
        if size > limit:  # many numbers from a few bytes: a view that repeats them
            return {"error": f"its tensors are larger than the file ({limit} bytes)"}
    # A copy of each: safetensors takes no two tensors that share memory.
    tensors = {name: value.detach().clone().contiguous() for name, value in held.items()}
    save_file(tensors, target, {"format": "pt"})
    return {"tensors": len(tensors)}


def _main() -> None:
    sys.path[:] = sys.argv[5:]
    source, target, memory, output = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    import safetensors.torch  # noqa: F401 (before the limits, which count what comes after)
    import torch

    torch.set_num_threads(1)
    _limit(memory, output)
    try:
        answer = take_tensors(source, target, Path(source).stat().st_size)
    except BaseException as err:  # a stranger's file can make the reader raise anything
        lines = [line.strip() for line in str(err).splitlines() if line.strip()]
        unsupported = next((line for line in lines if "global" in line.lower()), "")
        words = (unsupported or (lines[0] if lines else "")).split(" Please ")[0]  # advice to programmers
        answer = {"error": f"{type(err).__name__}: {words}"[:400]}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
