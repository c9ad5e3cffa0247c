"""Decode steps captured once as CUDA graphs, by number of rows, and replayed.

A step is two graphs: the model's by `Variant` (`stock` when no row can skip, `neurons` when one
leaves out neurons, `skip` otherwise), and the sampler's by `SamplingKind`. All variants of a bucket
read and write the same tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, get_args

import torch
from torch import Tensor

from skipllm_core.kernels.gpu.rows import Variant
from skipllm_core.runner.device_sampler import (
    STEP_BYTES_PER_LOGIT,
    DeviceSampler,
    SamplingKind,
)

logger = logging.getLogger(__name__)

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)

# What a captured launch takes on the device. An assumption until measured: vLLM's logs tell of 24
# to 28 MiB for the graph of a whole step (its issue 50780 and pull request 22897), which has some
# hundred launches.
NODE_BYTES = 2**16
# At most: of a layer by variant and beside the layers (see kernels/gpu/decoder.py and neurons.py),
# of a sampler's graph, and of a sort, which torch may do row by row.
LAYER_NODES: dict[Variant, int] = {"stock": 7, "skip": 9, "neurons": 12}
STEP_NODES, SAMPLER_NODES, SORT_NODES_PER_ROW = 6, 60, 12

Launch = Callable[[], None]
Capture = Callable[[Launch], Launch]  # a launch -> what launches the same from now on


class Decoder(Protocol):
    """The model's part of a decode step over `DeviceRows`; see kernels/gpu."""

    @property
    def buffers(self) -> tuple[Tensor, ...]: ...  # what it has beside the rows and the model

    def step(self, num_rows: int, variant: Variant) -> None: ...


def buckets(max_num_rows: int) -> tuple[int, ...]:
    """The numbers of rows that steps are padded to, ascending; the last one is max_num_rows."""
    largest = _BUCKETS[-1]
    above = range(2 * largest, max_num_rows, largest)
    return (*(n for n in (*_BUCKETS, *above) if n < max_num_rows), max_num_rows)


def reserve_bytes(max_num_rows: int, num_layers: int, vocab_size: int) -> int:
    """What the graphs of `DecodeGraphs` are reckoned to take: their launches, and the memory that
    the sampler's share, which are those of most rows."""
    all_rows = buckets(max_num_rows)
    num_graphs = len(SamplingKind)
    of_model = sum(nodes * num_layers + STEP_NODES for nodes in LAYER_NODES.values())
    num_nodes = len(all_rows) * of_model
    num_nodes += len(all_rows) * num_graphs * SAMPLER_NODES + sum(all_rows) * SORT_NODES_PER_ROW
    return num_nodes * NODE_BYTES + max_num_rows * vocab_size * STEP_BYTES_PER_LOGIT


class DecodeGraphs:
    """Every variant of the decode step, captured at construction.

    `capture` is the seam: `direct` launches each time anew, `CudaCapture` records a graph. Rows
    have to be padded (position -1) when this is made, as capturing runs the steps.
    """

    def __init__(
        self, decoder: Decoder, sampler: DeviceSampler, max_num_rows: int, capture: Capture
    ) -> None:
        self.buckets = buckets(max_num_rows)
        self._model: dict[tuple[int, Variant], Launch] = {}
        self._sampling: dict[tuple[int, SamplingKind], Launch] = {}
        for num_rows in reversed(self.buckets):  # the largest first: the rest fit into its memory
            start_s = time.monotonic()
            used = _cuda_bytes(sampler.rows.device)
            for variant in get_args(Variant):
                self._model[num_rows, variant] = capture(
                    lambda n=num_rows, v=variant: decoder.step(n, v)  # type: ignore[misc]
                )
            for kind in SamplingKind:
                self._sampling[num_rows, kind] = capture(
                    lambda n=num_rows, k=kind: sampler.step(n, k)  # type: ignore[misc]
                )
            logger.info(
                "decode steps of %d rows captured in %.1f s, %.0f MiB",
                num_rows,
                time.monotonic() - start_s,
                (_cuda_bytes(sampler.rows.device) - used) / 2**20,
            )

    def bucket(self, num_rows: int) -> int:
        return next(n for n in self.buckets if n >= num_rows)

    def launch(self, num_rows: int, variant: Variant, kind: SamplingKind) -> None:
        bucket = self.bucket(num_rows)
        self._model[bucket, variant]()
        self._sampling[bucket, kind]()


def direct(launch: Launch) -> Launch:
    """No graph: what is launched is launched anew each time."""
    return launch


class CudaCapture:
    """Captures launches as CUDA graphs that share one memory pool; they never run side by side.

    A graph knows addresses and no tensors: it keeps its launch, so that what that reads and writes
    is not freed (and lent to others) under it.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, launch: Launch) -> Launch:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launch()  # compiles and tunes the kernels, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            launch()
        return partial(_replay, graph, launch)


def _replay(graph: torch.cuda.CUDAGraph, _kept: Launch) -> None:
    graph.replay()


def _cuda_bytes(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
