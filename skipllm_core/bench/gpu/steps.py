"""The decode step's kernels on a CUDA device: a graph replayed over and over, without sampling.

Random weights: what is skipped means nothing, so speed is seen and quality is not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from skipllm_core.bench.bandwidth import synchronize
from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.kernels.gpu.linear import Tiles, tile_for
from skipllm_core.kernels.gpu.rows import DeviceRows, RowPolicy
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.layers import Linear
from skipllm_core.model.llama import LlamaModel
from skipllm_core.runner.graphs import Capture, Launch
from skipllm_core.types import ROWS_PER_NEURON

BLOCK_SIZE = 16
UNREACHABLE = 2.0  # a threshold that no similarity has
NUM_ROUNDS = 5
ROUND_MS = 50.0  # of a round, about: long steps need no twenty replays to be timed
NUM_BISECTIONS = 20

Shares = tuple[float, float]  # of neurons: before up, and of the rest before down


def milliseconds(
    launch: Callable[[], object], device: torch.device, num_replays: int = 20
) -> float:
    """The median over rounds of the time of one replay; a round has `num_replays`, or fewer where
    they are long."""
    launch()
    one = max(1e-3, _seconds(launch, device, 1) * 1e3)
    num_replays = max(1, min(num_replays, int(ROUND_MS / one)))
    rounds = [_seconds(launch, device, num_replays) for _ in range(NUM_ROUNDS)]
    return statistics.median(rounds) / num_replays * 1e3


def _seconds(launch: Callable[[], object], device: torch.device, num_replays: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(num_replays):
        launch()
    synchronize(device)
    return time.perf_counter() - start


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


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A step whose rows leave out neurons; FFN weights in blocks' worth."""

    ms: float
    mean: float  # left out by a row
    joint: float  # wanted by no row


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
        decoder_type: type[GpuDecoder] = GpuDecoder,
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
        decoder = decoder_type(model, cache, self.rows, tiles=tiles)
        self._stock = capture(lambda: decoder.step(batch, "stock"))
        self._skip = capture(lambda: decoder.step(batch, "skip"))
        self._capture = capture
        self._make_decoder = partial(decoder_type, model, cache, self.rows, tiles=tiles)
        self._neurons: dict[bool, Launch] = {}  # by whether rows choose together

    def never(self, num_replays: int = 20) -> float:
        """Milliseconds of the stock step."""
        return milliseconds(self._stock, self.device, num_replays)

    def gate_alone(self, num_replays: int = 20) -> float:
        """Every row watched at every layer, and none of them skips."""
        self._watch(1, self.num_layers - 1)
        return milliseconds(self._skip, self.device, num_replays)

    def natural(self, num_skipped: float, num_replays: int = 20) -> tuple[float, list[int]]:
        """Rows skip where their own similarities reach one threshold: the one at which a row skips
        `num_skipped` blocks on average, as nearly as there is one. And what each row skips."""
        self._watch(max(1, self.num_layers // 8), self.last_skippable)
        low, high = -1.0, 1.0  # most is skipped at the lowest
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            self.rows.thresholds.fill_(middle)
            self._skip()
            mean = float(self.rows.skipped.sum()) / self.batch
            low, high = (middle, high) if mean >= num_skipped else (low, middle)
        self.rows.thresholds.fill_(low)
        ms = milliseconds(self._skip, self.device, num_replays)
        return ms, self.rows.skipped.sum(dim=1).tolist()

    def _watch(self, cold_start: int, cold_end: int) -> None:
        self.rows.policies.fill_(RowPolicy.FFN_SKIP)
        self.rows.thresholds.fill_(UNREACHABLE)
        self.rows.cold_starts.fill_(cold_start)
        self.rows.cold_ends.fill_(cold_end)

    def neurons(self, shares: Shares, num_replays: int = 20, *, together: bool = False) -> LeftOut:
        """Rows leave out `shares` of the neurons of every layer, by thresholds that are found for
        it: before up, and of the rest before down."""
        launch = self._neuron_graph(together)
        self.rows.policies.fill_(RowPolicy.NEURONS)
        self.rows.neuron_thresholds.zero_()
        for which, share in enumerate(shares):
            if share:
                self._find_thresholds(launch, which, share)
        ms = milliseconds(launch, self.device, num_replays)
        num_weight_rows = ROWS_PER_NEURON * self.model.config.intermediate_size
        before_up, before_down = self.rows.neuron_counts.sum(dim=(0, 1)).tolist()
        mean = (2 * before_up + before_down) / self.batch / num_weight_rows
        return LeftOut(ms, mean, int(self.rows.unread.sum()) / num_weight_rows)

    def _neuron_graph(self, together: bool) -> Launch:
        if together not in self._neurons:
            decoder = self._make_decoder(consensus=together)
            self._neurons[together] = self._capture(lambda: decoder.step(self.batch, "neurons"))
        return self._neurons[together]

    def _find_thresholds(self, launch: Launch, which: int, share: float) -> None:
        """By bisection of their logarithms, in all layers at a time: about, as what a layer leaves
        out changes the scores of the next ones."""
        num_neurons = self.model.config.intermediate_size
        low = torch.full((self.num_layers,), -16.0, device=self.device)
        high = torch.full_like(low, 8.0)  # random weights have scores far from both
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            self.rows.neuron_thresholds[:, :, which] = middle.exp2()
            launch()
            counts = self.rows.neuron_counts.float().mean(dim=0)
            left = num_neurons - counts[:, 0] if which else num_neurons
            is_enough = counts[:, which] >= share * left
            low, high = torch.where(is_enough, low, middle), torch.where(is_enough, middle, high)
        self.rows.neuron_thresholds[:, :, which] = high.exp2()

    @property
    def last_skippable(self) -> int:
        """The end of the layers that are skipped here: the last eighth never is."""
        return self.num_layers - max(1, self.num_layers // 8)

    def forced(self, num_skipped: Sequence[int], num_replays: int = 20) -> float:
        """Row r skips num_skipped[r] blocks: the last ones before the middle's end, as a trigger
        does; so the rows' sets are nested."""
        self.rows.policies.fill_(RowPolicy.MASK)
        self.rows.mask.copy_(self._masks([num_skipped])[0])
        return milliseconds(self._skip, self.device, num_replays)

    def varying(self, steps: Sequence[Sequence[int]]) -> float:
        """Milliseconds of a step on average, the rows of step i skipping steps[i] blocks. A mask is
        copied before each: to be compared with a `varying` alone."""
        masks = self._masks(steps).to(self.device)
        self.rows.policies.fill_(RowPolicy.MASK)

        def launch() -> None:
            for mask in masks:
                self.rows.mask.copy_(mask)
                self._skip()

        self._skip()
        return _seconds(launch, self.device, 1) / len(steps) * 1e3

    def _masks(self, steps: Sequence[Sequence[int]]) -> torch.Tensor:
        end = self.last_skippable
        masks = torch.zeros(len(steps), self.batch, self.num_layers, dtype=torch.int32)
        for mask, counts in zip(masks, steps, strict=True):
            for row, count in enumerate(counts):
                assert 0 <= count <= end
                mask[row, end - count : end] = 1
        return masks

    @property
    def bytes_per_step(self) -> int:
        """Weights of all layers and the head, and the K and V of the context, once each."""
        config = self.model.config
        linears = [module for module in self.model.modules() if isinstance(module, Linear)]
        weights = sum(linear.weight.numel() * linear.weight.itemsize for linear in linears)
        kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return weights + self.batch * self.context * kv * self.model.embedding.itemsize
