"""The decode step's kernels on a CUDA device: a graph replayed over and over, without sampling.

Random weights: a block is skipped because it is told to be, so speed is seen and quality is not.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from skipllm_core.bench.bandwidth import synchronize
from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.kernels.gpu.linear import Tiles, gate_up, tile_for
from skipllm_core.kernels.gpu.linear import linear as apply_linear
from skipllm_core.kernels.gpu.rows import DeviceRows, RowPolicy
from skipllm_core.model.layers import Linear
from skipllm_core.model.llama import LlamaModel
from skipllm_core.runner.graphs import Capture, Launch
from skipllm_core.runner.kv_cache import KVCache

BLOCK_SIZE = 16
UNREACHABLE = 2.0  # a threshold that no similarity has
NUM_ROUNDS = 5
EMPTY_LAUNCHES = 100


def milliseconds(
    launch: Callable[[], object], device: torch.device, num_replays: int = 20
) -> float:
    """The median over rounds of the time of one of `num_replays` replays, after a warm-up."""
    launch()
    rounds = []
    for _ in range(NUM_ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(num_replays):
            launch()
        synchronize(device)
        rounds.append((time.perf_counter() - start) / num_replays * 1e3)
    return statistics.median(rounds)


def copy_bytes_per_s(device: torch.device, num_bytes: int = 2**31) -> float:
    """Device to device, bytes read and bytes written."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / milliseconds(lambda: target.copy_(source), device, 5) * 1e3


@dataclass(frozen=True, slots=True)
class Fit:
    """ms = full_ms - block_ms * blocks skipped, by least squares."""

    full_ms: float
    block_ms: float
    max_residual_ms: float

    @classmethod
    def of(cls, skipped: Sequence[float], ms: Sequence[float]) -> Fit:
        """At least two different numbers of skipped blocks."""
        mean_x, mean_y = statistics.fmean(skipped), statistics.fmean(ms)
        covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(skipped, ms, strict=True))
        slope = covariance / sum((x - mean_x) ** 2 for x in skipped)
        full = mean_y - slope * mean_x
        residuals = [abs(full + slope * x - y) for x, y in zip(skipped, ms, strict=True)]
        return cls(full, -slope, max(residuals))


class StepBench:
    """Decode steps of `batch` rows at one context, whose past is random."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        batch: int,
        context: int,
        capture: Capture,
        tiles: Tiles = tile_for,
    ) -> None:
        config, device = model.config, model.embedding.device
        self.model, self.batch, self.context = model, batch, context
        self.num_layers = config.num_layers
        self.device = device
        blocks_per_row = -(-(context + 1) // BLOCK_SIZE)
        cache = KVCache(
            config,
            num_blocks=batch * blocks_per_row,
            block_size=BLOCK_SIZE,
            dtype=model.embedding.dtype,
            device=device,
        )
        for memory in (*cache.keys, *cache.values):
            memory.normal_()
        self.rows = DeviceRows(
            max_num_rows=batch,
            max_blocks=blocks_per_row,
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            device=device,
        )
        order = torch.randperm(batch * blocks_per_row, generator=torch.Generator().manual_seed(0))
        self.rows.block_tables.copy_(order.view(batch, blocks_per_row))
        self.rows.token_ids.random_(0, config.vocab_size)
        self.rows.positions.fill_(context)
        decoder = GpuDecoder(model, cache, self.rows, tiles=tiles)
        self._stock = capture(lambda: decoder.step(batch, can_skip=False))
        self._skip = capture(lambda: decoder.step(batch, can_skip=True))

    def never(self, num_replays: int = 20) -> float:
        """Milliseconds of the stock step."""
        return milliseconds(self._stock, self.device, num_replays)

    def gate_alone(self, num_replays: int = 20) -> float:
        """Every row watched at every layer, and none of them skips."""
        self.rows.policies.fill_(RowPolicy.FFN_SKIP)
        self.rows.thresholds.fill_(UNREACHABLE)
        self.rows.cold_starts.fill_(1)
        self.rows.cold_ends.fill_(self.num_layers - 1)
        return milliseconds(self._skip, self.device, num_replays)

    def forced(self, num_skipped: Sequence[int], num_replays: int = 20) -> float:
        """Row r skips num_skipped[r] blocks: the last ones before the middle's end, as a trigger
        does; so the rows' sets are nested."""
        end = self.num_layers - max(1, self.num_layers // 8)
        mask = torch.zeros(self.batch, self.num_layers, dtype=torch.int32)
        for row, count in enumerate(num_skipped):
            assert 0 <= count <= end
            mask[row, end - count : end] = 1
        self.rows.policies.fill_(RowPolicy.MASK)
        self.rows.mask.copy_(mask)
        return milliseconds(self._skip, self.device, num_replays)

    @property
    def bytes_per_step(self) -> int:
        """Weights of all layers and the head, and the K and V of the context, once each."""
        config = self.model.config
        linears = [module for module in self.model.modules() if isinstance(module, Linear)]
        weights = sum(linear.weight.numel() * linear.weight.itemsize for linear in linears)
        kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return weights + self.batch * self.context * kv * self.model.embedding.itemsize


def spread_triggers(batch: int, most: int, *, spread: int = 2, never: float = 0.02) -> list[int]:
    """Blocks skipped by each row when triggers scatter normally by `spread` layers around the one
    that skips `most` - 2 * spread, and a share `never` does not trigger. Seeded."""
    rng = random.Random(batch)  # noqa: S311
    middle = most - 2 * spread
    return [
        0 if rng.random() < never else min(most, max(0, round(rng.gauss(middle, spread))))
        for _ in range(batch)
    ]


def linear_gb_per_s(model: LlamaModel, num_rows: int, capture: Capture) -> dict[str, float]:
    """How fast the linears of all layers are read, by name, with `num_rows` rows."""
    device, dtype = model.embedding.device, model.embedding.dtype
    found = {}
    for name in ("qkv", "o", "gate_up", "down"):
        linears = [
            getattr(block.attention if name in ("qkv", "o") else block.ffn, name)
            for block in model.blocks
        ]
        num_outputs, num_inputs = linears[0].weight.shape
        x = torch.randn(num_rows, num_inputs, device=device).to(dtype)
        out = torch.zeros(num_rows, num_outputs, dtype=dtype, device=device)
        launch = capture(_apply_all(linears, x, out))
        num_bytes = sum(one.weight.numel() * one.weight.itemsize for one in linears)
        found[name] = num_bytes / milliseconds(launch, device) / 1e6
    return found


def _apply_all(linears: list[Linear], x: torch.Tensor, out: torch.Tensor) -> Launch:
    def launch() -> None:
        for one in linears:
            apply_linear(x, one, out, len(x))

    return launch


def empty_kernel_us(model: LlamaModel, num_rows: int, capture: Capture) -> float:
    """Microseconds of a predicated kernel in a graph when all its rows skip."""
    device, block = model.embedding.device, model.blocks[0]
    dtype = model.embedding.dtype
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    h = torch.zeros(num_rows, hidden, dtype=dtype, device=device)
    act = torch.zeros(num_rows, inner, dtype=dtype, device=device)
    nobody = torch.zeros(num_rows, dtype=torch.int32, device=device)

    def launch() -> None:
        for _ in range(EMPTY_LAUNCHES):
            gate_up(h, block.norm2, block.ffn.gate_up, act, num_rows, run=nobody)

    return milliseconds(capture(launch), device) / EMPTY_LAUNCHES * 1e3
