"""Thresholds of the policy `neurons`: from the full model's scores to shares of FFN weights.

Of a layer's neurons a share goes before up, and a larger one before down at the latest:

    | out before up ...... | ............... | kept ............ |
    | out before down at the latest ........ |

The first share is the square of the second, in every layer: of the splits that leave out as much
it costs the least, and others near it cost hardly more (docs/experiments.md). Leaving neurons out
changes what later layers and tokens see, but hardly how much is left out of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from skipllm_core.types import SkipParams

SIGNIFICANT_DIGITS = 6  # of a threshold


def shares_for(share: float) -> tuple[float, float]:
    """The shares of neurons that go before up, and before down at the latest, which leave this
    share of the FFN weights out: their sum is three times as much. 0 <= share < 2 / 3."""
    before_down = (math.sqrt(1 + 12 * share) - 1) / 2
    return before_down**2, before_down


def neurons_skip(scores: Sequence[Tensor], share: float, warmup_tokens: int) -> SkipParams:
    """The settings that leave this share of FFN weights out, by each layer's pairs of scores
    [2, number of pairs] in the full model."""
    return skip_of_shares(scores, *shares_for(share), warmup_tokens)


def skip_of_shares(
    scores: Sequence[Tensor], before_up: float, before_down: float, warmup_tokens: int
) -> SkipParams:
    """The same for shares of neurons, in every layer: before up, and before down at the latest."""
    up, down = [], []
    for first, second in scores:
        up.append(_quantile(first, before_up))
        left = second[first >= up[-1]]
        down.append(_quantile(left, (before_down - before_up) / (1 - before_up)))
    return SkipParams(
        policy="neurons",
        warmup_tokens=warmup_tokens,
        up_thresholds=tuple(up),
        down_thresholds=tuple(down),
    )


def _quantile(scores: Tensor, share: float) -> float:
    """The score that this share of the others is below; 0 where that is none of them."""
    rank = round(share * len(scores))
    if not 0 < rank < len(scores):
        return 0.0
    return float(f"{float(scores.kthvalue(rank + 1).values):.{SIGNIFICANT_DIGITS}g}")
