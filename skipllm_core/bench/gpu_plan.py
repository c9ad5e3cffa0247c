"""What `skipllm bench gpu` measures, in order, until its time is used up."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from skipllm_core.bench.gpu import Fit, StepBench, spread_triggers
from skipllm_core.bench.shapes import write_shape
from skipllm_core.config import Quantization
from skipllm_core.errors import ConfigError
from skipllm_core.kernels.gpu.linear import Tiles, tile_for
from skipllm_core.model.llama import LlamaModel
from skipllm_core.model.loader import load_model
from skipllm_core.runner.graphs import Capture
from skipllm_core.runner.kv_cache import KVCache

GpuPolicy = Literal[
    "never", "gate only", "forced", "mixed", "transformers eager", "transformers static"
]
NUM_TRANSFORMERS_TOKENS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMeasurement:
    """One row of the table and one line of the JSON; ratios to the `never` of the same shape."""

    model: str
    device: str
    dtype: str
    quantization: str
    policy: GpuPolicy
    batch: int
    context: int
    ms_per_step: float
    tokens_per_s: float
    forced_skip: float | None = None  # blocks a row skips; mixed: their mean
    ceiling_share: float | None = None
    speedup_vs_never: float | None = None
    token_skip_ratio: float | None = None
    weight_skip_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """What is no measurement of a step: a fit, or why something was left out."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    shapes: Sequence[str]
    batches: Sequence[int]
    contexts: Sequence[int]
    forced_skips: Sequence[int]
    quantizations: Sequence[Quantization] = ("none",)
    compare: bool = False
    budget_s: float = 480.0
    num_replays: int = 20


def load_shape(
    name: str, dtype: torch.dtype, device: torch.device, quantization: Quantization
) -> LlamaModel:
    """A shape with random weights. Raises ConfigError."""
    with tempfile.TemporaryDirectory() as folder:
        write_shape(name, Path(folder))
        return load_model(
            Path(folder),
            dtype=dtype,
            device=device,
            load_format="dummy",
            quantization=quantization,
        )


@torch.inference_mode()
def measure_plan(
    plan: Plan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    bytes_per_s: float,
    make_capture: Callable[[], Capture],
    clock: Callable[[], float] = time.monotonic,
    tiles: Tiles = tile_for,
) -> Iterator[GpuMeasurement | Told]:
    """Shape after shape; what no longer fits into the time or the memory is told, not measured."""
    end_s = clock() + plan.budget_s
    for shape in plan.shapes:
        for quantization in plan.quantizations:
            model: LlamaModel | None = None
            for context in plan.contexts:
                for batch in plan.batches:
                    what = f"{shape}, {quantization}, batch {batch}, context {context}"
                    if clock() > end_s:
                        yield Told(f"left out, as the time is used up: {what}")
                        continue
                    try:
                        if model is None:
                            model = load_shape(shape, dtype, device, quantization)
                        if not _fits(model, batch, context):
                            yield Told(f"left out, as its KV cache does not fit: {what}")
                            continue
                        yield from _measure_case(
                            partial(
                                StepBench, model, batch=batch, context=context,
                                capture=make_capture(), tiles=tiles,
                            ),
                            plan, shape, str(dtype).removeprefix("torch."), quantization,
                            bytes_per_s,
                        )  # fmt: skip
                    except torch.OutOfMemoryError:
                        yield Told(f"left out, as the memory does not suffice: {what}")
            del model
        if plan.compare and clock() <= end_s:
            yield from _measure_transformers(plan, shape, device, dtype)


def _fits(model: LlamaModel, batch: int, context: int) -> bool:
    device = model.embedding.device
    if device.type != "cuda":
        return True
    needed = KVCache.block_bytes(
        model.config, block_size=1, dtype=model.embedding.dtype
    ) * batch * (context + 64)  # fmt: skip
    torch.cuda.empty_cache()  # what the case before has left is free, but the driver does not know
    return needed < 0.9 * torch.cuda.mem_get_info(device)[0]


def _measure_case(
    make_bench: Callable[[], StepBench],
    plan: Plan,
    shape: str,
    dtype: str,
    quantization: Quantization,
    bytes_per_s: float,
) -> Iterator[GpuMeasurement | Told]:
    bench = make_bench()  # here, so that its memory is free when the case ends, and if it fails
    never_ms = bench.never(plan.num_replays)

    def row(policy: GpuPolicy, ms: float, skipped: Sequence[int]) -> GpuMeasurement:
        mean, joint = statistics.fmean(skipped), min(skipped)
        ffn = bench.model.blocks[0].ffn
        saved = joint * sum(
            one.weight.numel() * one.weight.itemsize for one in (ffn.gate_up, ffn.down)
        )
        return GpuMeasurement(
            model=shape,
            device=str(bench.device),
            dtype=dtype,
            quantization=quantization,
            policy=policy,
            batch=bench.batch,
            context=bench.context,
            ms_per_step=ms,
            tokens_per_s=bench.batch / ms * 1e3,
            forced_skip=None if policy in ("never", "gate only") else mean,
            ceiling_share=(bench.bytes_per_step - saved) / bytes_per_s / (ms / 1e3),
            speedup_vs_never=never_ms / ms,
            token_skip_ratio=mean / bench.num_layers,
            weight_skip_ratio=joint / bench.num_layers,
        )

    nobody = [0] * bench.batch
    yield row("never", never_ms, nobody)
    yield row("gate only", bench.gate_alone(plan.num_replays), nobody)
    counts = [k for k in plan.forced_skips if k <= bench.num_layers - max(1, bench.num_layers // 8)]
    times = []
    for count in counts:
        skipped = [count] * bench.batch
        times.append(bench.forced(skipped, plan.num_replays))
        yield row("forced", times[-1], skipped)
    if len(set(counts)) < 2:
        return
    fit = Fit.of(counts, times)
    yield Told(
        f"{shape}, {quantization}, batch {bench.batch}, context {bench.context}: "
        f"ms = {fit.full_ms:.3f} - {fit.block_ms * 1e3:.1f} us x blocks skipped, off by "
        f"{fit.max_residual_ms:.3f} ms at most"
    )
    if bench.batch > 1:
        skipped = spread_triggers(bench.batch, max(counts))
        ms = bench.forced(skipped, plan.num_replays)
        yield row("mixed", ms, skipped)
        yield Told(
            f"rows that skip {min(skipped)} to {max(skipped)} blocks save "
            f"{fit.full_ms - ms:.3f} ms; their {min(skipped)} common ones are worth "
            f"{min(skipped) * fit.block_ms:.3f} ms"
        )


def _measure_transformers(
    plan: Plan, shape: str, device: torch.device, dtype: torch.dtype
) -> Iterator[GpuMeasurement | Told]:
    """Its own random weights of the same shape: a step's time does not depend on them."""
    from skipllm_core.bench.compare import TransformersModel

    batch, context = plan.batches[0], plan.contexts[0]
    with tempfile.TemporaryDirectory() as folder:
        write_shape(shape, Path(folder))
        peer = TransformersModel(Path(folder), dtype=dtype, device=device, is_dummy=True)
    prompts = torch.randint(3, 1000, (batch, context)).tolist()
    kinds: tuple[tuple[GpuPolicy, bool], ...] = (
        ("transformers eager", False),
        ("transformers static", True),
    )
    for policy, is_static in kinds:
        try:
            peer.decode(prompts, NUM_TRANSFORMERS_TOKENS, is_static=is_static)  # compiles
            steps, _ = peer.decode(prompts, NUM_TRANSFORMERS_TOKENS, is_static=is_static)
        except (RuntimeError, ConfigError) as error:
            yield Told(f"{policy}: {str(error).splitlines()[0]}")
            continue
        ms = statistics.median(steps) * 1e3
        yield GpuMeasurement(
            model=shape,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            quantization="none",
            policy=policy,
            batch=batch,
            context=context,
            ms_per_step=ms,
            tokens_per_s=batch / ms * 1e3,
        )
