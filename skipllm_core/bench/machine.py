"""What the machine says of itself. No torch here."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPU_DIR = Path("/sys/devices/system/cpu")

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def last_level_cache_bytes(cpu_dir: Path = CPU_DIR) -> int | None:
    """The last-level caches of the cores that this process may use, together; None: not told.

    Cores that share a cache name the same `shared_cpu_list`, so that it is counted once.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    if affinity is None:
        return None
    sizes: dict[tuple[int, str], int] = {}  # (level, the cores that share it)
    try:
        for cpu in affinity(0):
            for index in (cpu_dir / f"cpu{cpu}" / "cache").glob("index*"):
                if (index / "type").read_text().strip() == "Instruction":
                    continue
                level = int((index / "level").read_text())
                shared_by = (index / "shared_cpu_list").read_text().strip()
                sizes[level, shared_by] = _num_bytes((index / "size").read_text().strip())
    except (OSError, ValueError):
        return None
    if not sizes:
        return None
    last = max(level for level, _ in sizes)
    return sum(size for (level, _), size in sizes.items() if level == last)


def _num_bytes(text: str) -> int:
    """ "480K" as the kernel writes it."""
    unit = _UNITS.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit
