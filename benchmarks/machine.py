"""What a measurement was made on: every result file says it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine(*packages: str) -> dict[str, object]:
    """Processor, cores, memory (bytes), the last minute's load, the versions of Python and ``packages``."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "hardware": {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_bytes": memory},
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
    }
