"""How much memory the KV cache may take, and what is said when the device's runs out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch

from skipllm_core.config import EngineConfig
from skipllm_core.errors import ConfigError

CPU_SHARE = 0.5  # of what is available: the rest of the machine has to live too
# Torch's allocator on CUDA: tensors are rounded up to the one, what it asks the driver for to the
# other.
ALLOCATION_BYTES = 512
SEGMENT_BYTES = 2**21

Self = TypeVar("Self")
Rest = ParamSpec("Rest")


def tells_what_to_lower(
    start: Callable[Concatenate[Self, EngineConfig, Rest], None],
) -> Callable[Concatenate[Self, EngineConfig, Rest], None]:
    """Of a constructor: memory of the device that runs out is a ConfigError with what to lower."""

    @wraps(start)
    def told(self: Self, config: EngineConfig, /, *args: Rest.args, **kwargs: Rest.kwargs) -> None:
        try:
            start(self, config, *args, **kwargs)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise ConfigError(_what_to_lower(config, error)) from error

    return told


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Torch has a type for it; of the driver, and so of Triton and of graphs, there are words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _what_to_lower(config: EngineConfig, error: RuntimeError) -> str:
    cache = f"--gpu-memory-utilization ({config.gpu_memory_utilization})"
    if config.kv_cache_memory_bytes is not None:
        cache = f"--kv-cache-memory ({mib(config.kv_cache_memory_bytes)})"
    smaller = "" if config.quantization != "none" else ", or use --quantization int8"
    return (
        "the GPU's memory does not suffice. Lower --max-model-len "
        f"({config.max_model_len or 'as the model was made for'}), --max-num-seqs "
        f"({config.max_num_seqs}), --max-num-batched-tokens ({config.max_num_batched_tokens}) or "
        f"{cache}{smaller}: {str(error).splitlines()[0]}"
    )


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


def held_tensors(holder: object) -> list[torch.Tensor]:
    """The tensors that are the object's attributes."""
    return [value for value in vars(holder).values() if isinstance(value, torch.Tensor)]


def allocated_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What they take on a CUDA device, wherever they are."""
    return sum(-(-tensor.nbytes // ALLOCATION_BYTES) * ALLOCATION_BYTES for tensor in tensors)


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
