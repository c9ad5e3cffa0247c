"""Which region and threshold of `ffn_skip` give a ratio at the least cost: by trying them out.

The full model's similarities foretell the ratio that a threshold gives; skipping changes what later
layers and tokens see, so the ratio drifts from that. Passes over some of the answers tell the drift
of each region, and what it costs there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from skipllm_core.calibration.measure import Measurement
from skipllm_core.calibration.regions import (
    Region,
    find_threshold,
    max_reachable_ratio,
    share_skipped,
)
from skipllm_core.types import SkipParams

TryOut = Callable[[Sequence[SkipParams]], list[Measurement]]

TOLERANCE = 0.005  # of a ratio: no more tries are made
MAX_RETRIES = 2  # per target, of the region that was chosen
GROWTH = 1.5  # of the KL with the ratio, near a target: the power


@dataclass(slots=True)
class RegionSearch:
    """`similarities` are the full model's behind the warm-up [num_tokens, num_layers]; `tried` are
    those of the answers that `try_out` measures on."""

    similarities: Tensor
    tried: Tensor
    warmup_tokens: int
    try_out: TryOut
    _drifts: dict[Region, float] = field(default_factory=dict)

    def cheapest(self, regions: Sequence[Region], target: float) -> SkipParams:
        """The settings that give the target ratio at the lowest KL."""
        skips = [self._guess(region, target) for region in regions]
        found = self.try_out(skips)
        tries = [self._learn(*pair) for pair in zip(skips, found, strict=True)]
        costs = [
            measured.kl * (target / ratio) ** GROWTH if ratio else math.inf
            for ratio, measured in zip(tries, found, strict=True)
        ]
        best = costs.index(min(costs))
        skip, ratio = skips[best], tries[best]
        for _ in range(MAX_RETRIES):
            if abs(ratio - target) <= TOLERANCE:
                break
            other = self._guess(regions[best], target)
            if other == skip:
                break
            other_ratio = self._learn(other, *self.try_out([other]))
            if abs(other_ratio - target) < abs(ratio - target):
                skip, ratio = other, other_ratio
        return skip

    def _guess(self, region: Region, target: float) -> SkipParams:
        start, end = region
        skip = SkipParams(
            policy="ffn_skip", warmup_tokens=self.warmup_tokens, cold_start=start, cold_end=end
        )
        num_layers = self.similarities.shape[1]
        foretold = target / self._drifts.get(region, 1.0)
        foretold = min(foretold, max_reachable_ratio(region, num_layers))
        return replace(skip, threshold=find_threshold(self.similarities, skip, foretold))

    def _learn(self, skip: SkipParams, measured: Measurement) -> float:
        """The ratio to expect of the settings on all answers, by what they gave on some."""
        foretold = share_skipped(self.tried, skip)
        drift = measured.skipped_ffn_share / foretold if foretold else 1.0
        drift = min(4.0, max(0.25, drift))
        self._drifts[skip.cold_start, skip.cold_end] = drift
        return drift * share_skipped(self.similarities, skip)
