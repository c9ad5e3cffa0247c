"""What `skipllm bench gpu` measures, in order, until its time is used up.

Whatever fails, or does not fit, is told, and the rest goes on.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from skipllm_core.bench.bandwidth import measure_read_bandwidth, synchronize
from skipllm_core.bench.gpu.case import CaseBench
from skipllm_core.bench.gpu.if_nodes import IfNodeDecoder, has_if_nodes
from skipllm_core.bench.gpu.measurement import Item, Told
from skipllm_core.bench.gpu.parts import copy_bytes_per_s, empty_kernel_us, linear_gb_per_s
from skipllm_core.bench.gpu.peer import measure_transformers
from skipllm_core.bench.gpu.steps import StepBench
from skipllm_core.bench.shapes import write_shape
from skipllm_core.config import Quantization
from skipllm_core.kernels.gpu.linear import Tiles, tile_for
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.llama import LlamaModel
from skipllm_core.model.loader import load_model
from skipllm_core.runner.graphs import Capture

logger = logging.getLogger(__name__)

COMPILE_S = 60.0  # transformers' static cache is compiled, which takes about so long


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


class PlanBench:
    """Measures a plan on a device; `items` is to be iterated once, under inference mode."""

    def __init__(
        self,
        plan: Plan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        make_capture: Callable[[], Capture],
        clock: Callable[[], float] = time.monotonic,
        tiles: Tiles = tile_for,
        bytes_per_s: float | None = None,
    ) -> None:
        """`bytes_per_s`: what the device reads at most, if it is not to be measured."""
        self.plan, self.device, self.dtype = plan, device, dtype
        self._make_capture = make_capture
        self._clock = clock
        self._tiles = tiles
        self._bytes_per_s = bytes_per_s
        self._end_s = clock() + plan.budget_s

    def items(self) -> Iterator[Item]:
        """Shape after shape, the first batch and context of each with everything."""
        plan = self.plan
        if self._bytes_per_s is None:
            self._bytes_per_s = float("inf")  # until it is measured: no ceiling then
            yield from self._guarded("the memory's bandwidth", self._measure_memory)
        if not has_if_nodes():
            yield Told(f"no CUDA IF nodes: torch {torch.__version__} cannot capture them")
        for shape in plan.shapes:
            for quantization in plan.quantizations:
                yield from self._guarded(
                    f"{shape}, {quantization}",
                    lambda s=shape, q=quantization: self._measure_model(s, q),  # type: ignore[misc]
                )
                if not self._works():
                    yield Told("the device does not answer any more: nothing else is measured")
                    return
                if plan.compare and quantization == plan.quantizations[0]:
                    yield from self._compare(shape)

    def _guarded(
        self, what: str, measure: Callable[[], Iterator[Item]], needed_s: float = 0.0
    ) -> Iterator[Item]:
        """What `measure` finds until it fails; not begun when less than `needed_s` is left."""
        if self._clock() + needed_s > self._end_s:
            yield Told(f"left out, as the time is used up: {what}")
            return
        try:
            yield from measure()
        except torch.OutOfMemoryError:
            yield Told(f"left out, as the memory does not suffice: {what}")
        except Exception as error:
            logger.warning("%s failed", what, exc_info=True)
            yield Told(f"left out, as it failed: {what}: {type(error).__name__}: {_line(error)}")

    def _works(self) -> bool:
        """After some errors a CUDA device refuses everything until the process ends."""
        try:
            synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def _measure_memory(self) -> Iterator[Item]:
        copied = copy_bytes_per_s(self.device)
        read = measure_read_bandwidth(self.device).bytes_per_s
        self._bytes_per_s = max(copied, read)
        yield Told(
            f"memory: copies {copied / 1e9:.0f} GB/s, reads {read / 1e9:.0f} GB/s",
            {"copy_bytes_per_s": copied, "read_bytes_per_s": read},
        )

    def _measure_model(self, shape: str, quantization: Quantization) -> Iterator[Item]:
        plan = self.plan
        model = load_shape(shape, self.dtype, self.device, quantization)
        what = f"{shape}, {quantization}"
        yield from self._guarded(
            f"the linears of {what}", lambda: self._measure_linears(model, what)
        )
        for context in plan.contexts:
            for batch in plan.batches:
                case = f"{what}, batch {batch}, context {context}"
                if not _fits(model, batch, context):
                    yield Told(f"left out, as its KV cache does not fit: {case}")
                    continue
                yield from self._guarded(
                    case,
                    lambda b=batch, c=context: self._measure_case(  # type: ignore[misc]
                        model, shape, quantization, b, c
                    ),
                )
                if not self._works():
                    return

    def _measure_linears(self, model: LlamaModel, what: str) -> Iterator[Item]:
        empty = empty_kernel_us(model, 1, self._make_capture(), self._tiles)
        yield Told(
            f"{what}: a predicated kernel in a graph that does nothing: {empty:.2f} us",
            {"empty_kernel": what, "us": empty},
        )
        for num_rows in self.plan.batches:
            found = linear_gb_per_s(model, num_rows, self._make_capture(), self._tiles)
            speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in found.items())
            yield Told(
                f"{what}: linears of {num_rows} rows, GB/s: {speeds}",
                {"linears_gb_per_s": what, "num_rows": num_rows, **found},
            )

    def _measure_case(
        self, model: LlamaModel, shape: str, quantization: Quantization, batch: int, context: int
    ) -> Iterator[Item]:
        # Made here, so that its memory is free when the case ends, and if it fails.
        bench = self._step_bench(model, batch, context)
        assert self._bytes_per_s is not None
        case = CaseBench(
            bench,
            shape=shape,
            dtype=str(self.dtype).removeprefix("torch."),
            quantization=quantization,
            bytes_per_s=self._bytes_per_s,
            num_replays=self.plan.num_replays,
        )
        yield from case.measure(self.plan.forced_skips)
        is_first = batch == self.plan.batches[0] and context == self.plan.contexts[0]
        if is_first and has_if_nodes():
            yield from self._guarded(f"IF nodes, {case.what}", lambda: self._measure_if_nodes(case))

    def _measure_if_nodes(self, case: CaseBench) -> Iterator[Item]:
        """In a second bench beside the case's."""
        bench = case.bench
        other = self._step_bench(bench.model, bench.batch, bench.context, IfNodeDecoder)
        for count in (0, bench.num_layers // 4):
            ms = other.forced([count] * bench.batch, self.plan.num_replays)
            yield case.row_of_if_nodes(ms, count)

    def _step_bench(
        self,
        model: LlamaModel,
        batch: int,
        context: int,
        decoder_type: type[IfNodeDecoder] | None = None,
    ) -> StepBench:
        more = {} if decoder_type is None else {"decoder_type": decoder_type}
        return StepBench(
            model,
            batch=batch,
            context=context,
            capture=self._make_capture(),
            tiles=self._tiles,
            **more,
        )

    def _compare(self, shape: str) -> Iterator[Item]:
        plan = self.plan
        batch, context = plan.batches[0], plan.contexts[0]
        for is_static in (False, True):
            policy = "transformers static" if is_static else "transformers eager"
            yield from self._guarded(
                f"{policy}, {shape}",
                lambda s=is_static: measure_transformers(  # type: ignore[misc]
                    shape, batch, context, self.device, self.dtype, is_static=s
                ),
                COMPILE_S if is_static else 0.0,
            )


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _fits(model: LlamaModel, batch: int, context: int) -> bool:
    device = model.embedding.device
    if device.type != "cuda":
        return True
    needed = KVCache.block_bytes(
        model.config, block_size=1, dtype=model.embedding.dtype
    ) * batch * (context + 64)  # fmt: skip
    torch.cuda.empty_cache()  # what the case before has left is free, but the driver does not know
    return needed < 0.9 * torch.cuda.mem_get_info(device)[0]
