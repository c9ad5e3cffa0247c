"""What stands before a measurement: the machine's own limits, and the models in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from skipllm_core.bench.bandwidth import ReadBandwidth, measure_read_bandwidth
from skipllm_core.bench.machine import cpu_name
from skipllm_core.config import EngineConfig
from skipllm_core.errors import ConfigError
from skipllm_core.model.config import load_model_config
from skipllm_core.model.loader import resolve_dtype
from skipllm_core.runner.model_runner import TorchModelRunner, resolve_device

if TYPE_CHECKING:
    from skipllm_core.bench.compare import TransformersModel


@dataclass(frozen=True, slots=True)
class Machine:
    """What the numbers were measured on."""

    device_name: str
    num_threads: int
    torch_version: str
    bandwidth: ReadBandwidth


def measure_machine(config: EngineConfig) -> Machine:
    """Sets torch's threads as the runner will, and reads memory with them."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    is_cuda = device.type == "cuda"
    return Machine(
        device_name=torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        num_threads=torch.get_num_threads(),
        torch_version=str(torch.__version__),
        bandwidth=measure_read_bandwidth(device),
    )


@contextmanager
def loaded(
    config: EngineConfig, *, compare: bool
) -> Iterator[tuple[TorchModelRunner, TransformersModel | None]]:
    """The runner and, to compare with, transformers' model of the same weights, in the same dtype
    (a quantized runner is compared with the model as it was). Raises ConfigError."""
    if not compare:
        yield TorchModelRunner(config), None
        return

    from skipllm_core.bench.compare import TransformersModel, write_random_weights

    device = resolve_device(config.device)
    dtype = resolve_dtype(load_model_config(config.model_dir), device, config.dtype)
    with tempfile.TemporaryDirectory(prefix="skipllm-bench-") as directory:
        if config.load_format == "dummy":  # both have to read the same random weights
            try:
                shutil.copy(config.model_dir / "config.json", directory)
                write_random_weights(Path(directory), dtype=dtype, seed=config.seed)
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"cannot write random weights to {directory} (see TMPDIR): {error}"
                ) from error
            config = replace(config, model_dir=Path(directory), load_format="auto")
        theirs = TransformersModel(config.model_dir, dtype=dtype, device=device)
        ours = TorchModelRunner(config)
    yield ours, theirs
