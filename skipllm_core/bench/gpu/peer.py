"""The same step in transformers, for `skipllm bench gpu --compare`."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from skipllm_core.bench.gpu.measurement import GpuMeasurement, Item
from skipllm_core.bench.shapes import write_shape

NUM_TOKENS = 24


def measure_transformers(
    shape: str,
    batch: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_static: bool,
) -> Iterator[Item]:
    """Its `generate`, on random weights of its own: a step's time does not depend on them."""
    from skipllm_core.bench.compare import TransformersModel

    with tempfile.TemporaryDirectory() as folder:
        write_shape(shape, Path(folder))
        peer = TransformersModel(Path(folder), dtype=dtype, device=device, is_dummy=True)
    prompts = torch.randint(3, 1000, (batch, context)).tolist()
    peer.decode(prompts, NUM_TOKENS, is_static=is_static)  # compiles
    steps, _ = peer.decode(prompts, NUM_TOKENS, is_static=is_static)
    ms = statistics.median(steps) * 1e3
    yield GpuMeasurement(
        model=shape,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        quantization="none",
        policy="transformers static" if is_static else "transformers eager",
        batch=batch,
        context=context,
        ms_per_step=ms,
        tokens_per_s=batch / ms * 1e3,
    )
