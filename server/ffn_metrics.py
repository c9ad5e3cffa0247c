"""What Prometheus is told of the FFN by layer: blocks, and the neurons in them.

There are hundreds of these series, and a step may take a millisecond: it costs a few additions, and
samples are made when Prometheus asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from skipllm_core.types import StepStats


class FfnMetrics(Collector):
    def __init__(self) -> None:
        self._num_neurons = 0  # of a layer
        self._blocks_computed: list[int] = []  # these and the rest: per layer, so far
        self._blocks_skipped: list[int] = []
        self._before_up: list[int] = []  # neurons left out of blocks that were computed
        self._before_down: list[int] = []

    @property
    def is_shaped(self) -> bool:
        return self._num_neurons > 0

    def set_shape(self, num_layers: int, num_neurons: int) -> None:
        """Makes the series of every layer."""
        self._num_neurons = num_neurons
        for totals in (
            self._blocks_computed, self._blocks_skipped, self._before_up, self._before_down,
        ):  # fmt: skip
            totals += [0] * (num_layers - len(totals))

    def add(self, stats: StepStats) -> None:
        _add(self._blocks_computed, stats.ffn_computed)
        _add(self._blocks_skipped, stats.ffn_skipped)
        _add(self._before_up, stats.neurons_skipped_before_up)
        _add(self._before_down, stats.neurons_skipped_before_down)

    def collect(self) -> Iterator[CounterMetricFamily]:
        blocks = CounterMetricFamily(
            "skipllm_ffn_blocks",
            "FFN blocks of decode steps, and of prompts under skip.prompt, per token, by layer "
            "and outcome.",
            labels=("layer", "outcome"),
        )
        neurons = CounterMetricFamily(
            "skipllm_ffn_neurons",
            "Neurons of these blocks, per token, by layer and outcome. One left out before up "
            "leaves out 2 of its 3 rows of weights, one before down 1, one with its block all 3.",
            labels=("layer", "outcome"),
        )
        for layer, (computed, skipped, before_up, before_down) in enumerate(
            zip(
                self._blocks_computed,
                self._blocks_skipped,
                self._before_up,
                self._before_down,
                strict=True,
            )
        ):
            name = str(layer)
            blocks.add_metric((name, "computed"), computed)
            blocks.add_metric((name, "skipped"), skipped)
            num_kept = computed * self._num_neurons - before_up - before_down
            neurons.add_metric((name, "computed"), num_kept)
            neurons.add_metric((name, "skipped_before_up"), before_up)
            neurons.add_metric((name, "skipped_before_down"), before_down)
            neurons.add_metric((name, "skipped_with_block"), skipped * self._num_neurons)
        yield blocks
        yield neurons


def _add(totals: list[int], counts: Sequence[int]) -> None:
    for layer, count in enumerate(counts):
        totals[layer] += count
