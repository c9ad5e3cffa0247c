"""How fast this machine reads memory: the ceiling of every decode step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skipllm_core.bench.machine import last_level_cache_bytes
from skipllm_core.runner.memory import available_memory_bytes

NUM_REPEATS = 5
MIN_BUFFER_BYTES = 2**30
CACHE_FACTOR = 3  # buffer over last-level cache: what is read is no longer there next time
MEMORY_SHARE = 0.25  # of what is available
_COLUMNS = 4096
_TILE = 2**20  # random numbers, repeated: drawing them all would take longer than the measurement


@dataclass(frozen=True, slots=True)
class ReadBandwidth:
    """The best of several ways to read a buffer once, each repeated."""

    bytes_per_s: float
    kind: str  # the way that won
    buffer_bytes: int


def buffer_bytes(device: torch.device) -> int:
    """Much larger than the caches; on a CUDA device, whose caches are small, the least size."""
    if device.type == "cuda":
        return MIN_BUFFER_BYTES
    wanted = max(MIN_BUFFER_BYTES, CACHE_FACTOR * (last_level_cache_bytes() or 0))
    return min(wanted, int(available_memory_bytes() * MEMORY_SHARE))


@torch.inference_mode()
def measure_read_bandwidth(device: torch.device, num_bytes: int | None = None) -> ReadBandwidth:
    """Reads a float32 buffer of `num_bytes` with torch's present number of threads."""
    num_rows = max(1, (num_bytes or buffer_bytes(device)) // (4 * _COLUMNS))
    tile = torch.rand(_TILE // _COLUMNS, _COLUMNS, device=device)
    matrix = tile.repeat(-(-num_rows // len(tile)), 1)[:num_rows]
    vector = torch.rand(_COLUMNS, device=device)
    kinds: dict[str, Callable[[], Tensor]] = {
        "matrix times vector": lambda: torch.mv(matrix, vector),
        "sum": matrix.sum,
        "max": matrix.amax,
    }
    best = {kind: float("inf") for kind in kinds}
    for _ in range(NUM_REPEATS):
        for kind, read in kinds.items():
            best[kind] = min(best[kind], _time(read, device))
    kind = min(best, key=best.__getitem__)
    num_read = matrix.numel() * matrix.itemsize
    return ReadBandwidth(num_read / best[kind], kind, num_read)


def _time(read: Callable[[], Tensor], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    read()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for what was launched; nothing to wait for on a CPU. (Never run on CUDA so far.)"""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
