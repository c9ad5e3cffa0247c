"""From similarities to settings: regions that may be skipped, and thresholds for ratios.

A region's first layer is watched and never skipped: what lies before it has not triggered. The
rule: the plateau of the mean similarity is where skipping may begin (`find_plateau`). From it a
chain of regions is made, each within the next (`nested_regions`): narrower ones lose their worse
end layer, wider ones gain their better neighbour. For a target ratio a few are compared, by what
they cost (`candidates`): the narrowest that reaches the target, in which every token triggers at
once, and wider ones, which leave tokens room to differ; all of them also with the layer before, so
that their own first layer may be skipped too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from torch import Tensor

from skipllm_core.errors import ConfigError
from skipllm_core.types import SkipParams

PLATEAU_FACTOR = 3.0
SLACK = (0, 1, 2)  # of the compared regions, in twelfths of the layers
DIGITS = 6  # of the numbers in the profile

Region = tuple[int, int]  # cold_start, cold_end


def regions_for(means: Sequence[float], start: int | None, end: int | None) -> list[Region]:
    """What there is to choose from, narrow to wide: one region where an end of it is given. Raises
    ConfigError."""
    if start is None and end is None:
        return nested_regions(means)
    found = find_plateau(means)
    start, end = found[0] if start is None else start, found[1] if end is None else end
    if not 0 <= start < end - 1 < len(means) - 1:
        raise ConfigError(
            f"--cold-start {start} and --cold-end {end}: between them must be two layers or more, "
            f"without the last of {len(means)}"
        )
    return [(start, end)]


def nested_regions(means: Sequence[float]) -> list[Region]:
    """Regions of 1, 2, ... layers, each within the next: those inside the plateau, without their
    worse end layer one by one; the plateau; and wider ones, with their better neighbour one by
    one, up to all layers but the first and the last."""
    plateau = start, end = find_plateau(means)
    narrower: list[Region] = []
    while end - start > 1:
        if means[start] < means[end - 1]:
            start += 1
        else:
            end -= 1
        narrower.append((start, end))
    start, end = plateau
    wider: list[Region] = []
    while (start, end) != (1, len(means) - 1):
        below = means[start - 1] if start > 1 else -math.inf
        above = means[end] if end < len(means) - 1 else -math.inf
        if below >= above:
            start -= 1
        else:
            end += 1
        wider.append((start, end))
    return [*reversed(narrower), plateau, *wider]


def candidates(regions: Sequence[Region], target: float, num_layers: int) -> list[Region]:
    """Of regions from narrow to wide, those to compare for a target: the narrowest that reaches it
    and those that are wider by SLACK, of these regions and of the same begun one layer earlier.
    None: it is beyond them all. Of one region alone there is no other to compare."""
    if len(regions) == 1:  # given: there is nothing to choose
        return [r for r in regions if target <= max_reachable_ratio(r, num_layers)]
    step = max(1, round(num_layers / 12))
    found: list[Region] = []
    for earlier in (0, 1):
        begun = [(start - earlier, end) for start, end in regions]
        reaching = [r for r in begun if target <= max_reachable_ratio(r, num_layers)]
        found += [reaching[step * slack] for slack in SLACK if step * slack < len(reaching)]
    return list(dict.fromkeys(found))


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


def max_reachable_ratio(region: Region, num_layers: int) -> float:
    """Where every token triggers at the first skippable layer, and skips all the others."""
    return max(0, region[1] - 1 - region[0]) / num_layers


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


def share_skipped(similarities: Tensor, skip: SkipParams) -> float:
    """The share of FFN blocks that the settings skip, on the same similarities."""
    num_tokens, num_layers = similarities.shape
    reached = similarities[:, skip.cold_start : skip.cold_end - 1].cummax(dim=1).values
    return int((reached >= skip.threshold).sum()) / (num_tokens * num_layers)
