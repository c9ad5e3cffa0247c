"""From similarities to settings: the skippable region, and thresholds for ratios.

The rule for the region, whose outside is cold: the plateau of the mean similarity is the widest
that skipping may take without loss of its own (`find_plateau`); regions within it are compared by
what they cost (`candidate_regions`); a ratio that the plateau does not reach gets a wider region,
grown from it layer by layer (`wider_regions`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from torch import Tensor

from skipllm_core.types import SkipParams

PLATEAU_FACTOR = 3.0
MIN_REACH = 0.3  # of a region: at its reach every token must trigger at once, and nothing adapts
MAX_REGIONS = 5  # that are compared
DIGITS = 6  # of the numbers in the profile

Region = tuple[int, int]  # cold_start, cold_end


def candidate_regions(means: Sequence[float]) -> list[Region]:
    """Regions (cold_start, cold_end), each within the one before: the plateau, then without its
    worse end layer, and so on while there is still room to spare at MIN_REACH; MAX_REGIONS of
    them.
    """
    start, end = find_plateau(means)
    regions = [(start, end)]
    min_size = math.ceil(MIN_REACH * len(means)) + 1  # one triggers, the others are skipped
    while end - start > min_size:
        if means[start] < means[end - 1]:
            start += 1
        else:
            end -= 1
        regions.append((start, end))
    step = max(1.0, (len(regions) - 1) / (MAX_REGIONS - 1))
    return [regions[round(n * step)] for n in range(min(len(regions), MAX_REGIONS))]


def find_plateau(means: Sequence[float]) -> Region:
    """(first layer, last layer + 1) of the longest run on the plateau of the mean similarity.

    The plateau's height is the median over the middle half of the layers. A layer is on it when its
    FFN turns the residual by no more than PLATEAU_FACTOR times as much, measured as 1 - similarity.
    The first and the last layer are cold in any case.
    """
    changes = [1.0 - mean for mean in means]
    quarter = len(changes) // 4
    level = PLATEAU_FACTOR * median(changes[quarter : len(changes) - quarter])
    longest = start = 1
    end = 1
    for layer in range(1, len(changes) - 1):
        if changes[layer] > level:
            start = layer + 1
        elif layer + 1 - start > end - longest:
            longest, end = start, layer + 1
    return longest, end


def max_reachable_ratio(skip: SkipParams, num_layers: int) -> float:
    """Where every token triggers at the first skippable layer, and skips all the others."""
    return max(0, skip.cold_end - 1 - skip.cold_start) / num_layers


def find_threshold(similarities: Tensor, skip: SkipParams, ratio: float) -> float:
    """The threshold that skips this share of the FFN blocks, on similarities [num_tokens,
    num_layers] as the full model sees them. 0 < ratio <= max_reachable_ratio.

    A token skips one block for every layer of cold_start .. cold_end - 2 at or before which the
    threshold was reached. So the number of skipped blocks under a threshold is the number of
    entries of the running maximum (along the layers) that reach it, and a ratio a rank among them.
    """
    num_tokens, num_layers = similarities.shape
    reached = similarities[:, skip.cold_start : skip.cold_end - 1].cummax(dim=1).values.flatten()
    rank = min(max(1, round(ratio * num_layers * num_tokens)), len(reached))
    threshold = float(reached.sort(descending=True).values[rank - 1])
    rounded = math.floor(threshold * 10**DIGITS) / 10**DIGITS  # down: the rank has to reach it
    return float(min(1.0, rounded))


def wider_regions(means: Sequence[float], region: Region) -> list[Region]:
    """Regions that each hold the one before, from one layer more than `region` to all layers but
    the first and the last: the better neighbour is added first."""
    start, end = region
    regions = []
    while (start, end) != (1, len(means) - 1):
        below = means[start - 1] if start > 1 else -2.0
        above = means[end] if end < len(means) - 1 else -2.0
        if below >= above:
            start -= 1
        else:
            end += 1
        regions.append((start, end))
    return regions
