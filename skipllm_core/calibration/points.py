"""From measurements to the points of a profile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from skipllm_core.calibration.measure import Measurement
from skipllm_core.calibration.regions import DIGITS
from skipllm_core.skip.profile import FfnSkipPoint, LayerSimilarity, NeuronPoint, SkipPoint
from skipllm_core.types import SkipParams

Point = TypeVar("Point", bound=SkipPoint)


def block_point(target: float, measured: Measurement) -> SkipPoint:
    return SkipPoint(**_costs(target, measured))


def ffn_skip_point(target: float, skip: SkipParams, measured: Measurement) -> FfnSkipPoint:
    return FfnSkipPoint(
        **_costs(target, measured),
        threshold=skip.threshold,
        region=(skip.cold_start, skip.cold_end),
        trigger_layers=tuple(measured.trigger_layers),
    )


def neuron_point(target: float, skip: SkipParams, measured: Measurement) -> NeuronPoint:
    return NeuronPoint(
        **_costs(target, measured),
        up_thresholds=skip.up_thresholds,
        down_thresholds=skip.down_thresholds,
    )


def _costs(target: float, measured: Measurement) -> dict[str, Any]:
    return {
        "target_ratio": target,
        "skipped_ffn_share": round(measured.skipped_ffn_share, DIGITS),
        "weight_skip_ratio": {
            batch: round(ratio, DIGITS) for batch, ratio in measured.weight_skip_ratio.items()
        },
        "top1_agreement": round(measured.top1_agreement, DIGITS),
        "kl": round(max(0.0, measured.kl), DIGITS),
        "perplexity_change": round(measured.perplexity_change, DIGITS),
        "num_tokens": measured.num_tokens,
    }


def ascending(points: Iterable[Point]) -> tuple[Point, ...]:
    """Those that leave out more than all before them, as a profile has them. Of two thresholds
    that too few tokens can tell apart, the first stays."""
    kept: list[Point] = []
    for point in points:
        if point.skipped_ffn_share and all(_leaves_out_more(point, before) for before in kept[-1:]):
            kept.append(point)
    return tuple(kept)


def _leaves_out_more(point: SkipPoint, before: SkipPoint) -> bool:
    if (
        isinstance(point, FfnSkipPoint)
        and isinstance(before, FfnSkipPoint)
        and point.region == before.region
        and point.threshold > before.threshold
    ):
        return False
    return point.skipped_ffn_share > before.skipped_ffn_share


def similarity_curve(
    similarities: Tensor, block_influence: Sequence[float]
) -> tuple[LayerSimilarity, ...]:
    """Of similarities [num_tokens, num_layers]."""
    means = similarities.mean(dim=0).tolist()
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    columns = similarities.quantile(quantiles, dim=0).T.tolist()
    names = ("p05", "p25", "p50", "p75", "p95")
    return tuple(
        LayerSimilarity(
            mean=_within_one(mean),
            **{name: _within_one(value) for name, value in zip(names, values, strict=True)},
            block_influence=round(max(0.0, influence), DIGITS),
        )
        for mean, values, influence in zip(means, columns, block_influence, strict=True)
    )


def _within_one(cosine: float) -> float:
    """Rounded; a cosine taken in fp32 may be a little beyond 1."""
    return round(max(-1.0, min(1.0, cosine)), DIGITS)
