"""How much memory the KV cache may take."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

CPU_SHARE = 0.5  # of what is available: the rest of the machine has to live too


def cpu_budget_bytes() -> int:
    return int(available_memory_bytes() * CPU_SHARE)


def available_memory_bytes(
    proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Memory that can be had without swapping, a container's limit included."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        used -= int(stat["inactive_file"])  # gives way, as the checkpoint's pages just read do
    except (OSError, KeyError, ValueError):  # no cgroup v2, or "max"
        return available
    return min(available, max(0, limit - used))


def cuda_budget_bytes(
    device: torch.device, utilization: float, run_largest_step: Callable[[], None]
) -> int:
    """The share `utilization` of the device's memory, less what everything else needs at most:
    other processes, the weights, and the activations of the largest step, which is run once."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    not_torch = total - free - torch.cuda.memory_reserved(device)
    return int(total * utilization) - not_torch - peak
