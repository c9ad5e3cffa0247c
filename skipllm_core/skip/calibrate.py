"""Calibration: from a model and some prompts to its skip profile.

1. The full model answers the calibration prompts (greedily), and the similarity of every layer is
   recorded for every token it decodes.
2. The mean similarities give a plateau of skippable layers. It is narrowed as far as that makes
   skipping cheaper: the region is taken whose KL from the full model at REGION_RATIO is lowest.
   A target beyond its reach gets the narrowest of the wider regions that reaches it.
3. The distribution of the similarities gives a first threshold per target ratio, which free
   generation with skipping then corrects.
4. Each threshold is measured on held-out prompts: the ratio it gives in free generation, and how
   far its next-token distributions are from the full model's on the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from skipllm_core.config import EngineConfig
from skipllm_core.errors import ConfigError
from skipllm_core.model.fingerprint import model_fingerprint
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.skip.measure import Measurement, Probe, free_skip_ratio, measure, record
from skipllm_core.skip.profile import (
    DEFAULT_WARMUP_TOKENS,
    LayerSimilarity,
    SkipPoint,
    SkipProfile,
)
from skipllm_core.types import SkipParams

TARGET_RATIOS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35)  # beyond, the paper sees quality drop
DEFAULT_MAX_TOKENS = 128  # per prompt, as in the paper
HELD_OUT_EVERY = 4  # one prompt of four is measured on, and not calibrated with
PLATEAU_FACTOR = 3.0
REGION_RATIO = 0.25  # at which regions are compared
MIN_REACH = 0.3  # of a region: at its reach every token must trigger at once, and nothing adapts
MAX_REGIONS = 5  # that are compared
MAX_TRIES = 4  # per target
TOLERANCE = 0.005  # of a ratio: no more tries are made
DIGITS = 6  # of the numbers in the profile

OnProgress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


def no_progress(what: str, done: int, total: int) -> None:
    pass


def calibrate_model(
    config: EngineConfig,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    warmup_tokens: int = DEFAULT_WARMUP_TOKENS,
    on_progress: OnProgress = no_progress,
) -> SkipProfile:
    """Loads the model and calibrates it on token-id prompts, of which every fourth is held out."""
    if len(prompts) < 2:
        raise ConfigError("calibration needs at least two prompts: one of them is held out")
    fingerprint = model_fingerprint(config.model_dir)
    on_progress("loading the model", 0, 1)
    return calibrate(
        TorchModelRunner(config),
        [prompt for n, prompt in enumerate(prompts) if n % HELD_OUT_EVERY],
        list(prompts[::HELD_OUT_EVERY]),
        fingerprint=fingerprint,
        max_num_seqs=config.max_num_seqs,
        max_tokens=max_tokens,
        warmup_tokens=warmup_tokens,
        on_progress=on_progress,
    )


@torch.inference_mode()
def calibrate(
    runner: TorchModelRunner,
    prompts: list[list[int]],
    held_out_prompts: list[list[int]],
    *,
    fingerprint: str,
    max_num_seqs: int = 32,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    warmup_tokens: int = DEFAULT_WARMUP_TOKENS,
    on_progress: OnProgress = no_progress,
) -> SkipProfile:
    """Raises ConfigError where the prompts do not fit the model, or the answers end so early that
    no token is decoded after the warm-up."""
    if runner.num_layers < 4:
        raise ConfigError(f"a model of {runner.num_layers} layers has no middle region to skip in")
    total = 2 + len(TARGET_RATIOS)
    on_progress("recording similarities", 0, total)
    probe = Probe(runner, max_tokens=max_tokens, max_num_seqs=max_num_seqs)
    similarities, generated = record(probe, prompts)
    if not similarities.isfinite().all():
        raise ConfigError("the model's values are not finite: it cannot be calibrated")
    warm = similarities[generated >= warmup_tokens]
    if not len(warm):
        raise ConfigError(
            f"every answer ended within the warm-up of {warmup_tokens} tokens: calibrate with "
            "other prompts or fewer --warmup-tokens"
        )
    on_progress("choosing the skippable layers", 1, total)
    regions = candidate_regions(similarities.mean(dim=0).tolist())
    skips = [
        SkipParams(policy="ffn_skip", warmup_tokens=warmup_tokens, cold_start=start, cold_end=end)
        for start, end in regions
    ]
    costs = [_cost(probe, prompts, warm, skip) for skip in skips] if len(skips) > 1 else [0.0]
    chosen = costs.index(min(costs))
    points: list[SkipPoint] = []
    drift = 1.0
    for n, target in enumerate(TARGET_RATIOS, start=2):
        reaching = [
            skip
            for skip in skips[: chosen + 1]  # each within the one before
            if target <= max_reachable_ratio(skip, runner.num_layers)
        ]
        if not reaching:
            break
        skip = reaching[-1]
        on_progress(f"fitting and measuring a skip ratio of {target:.0%}", n, total)
        threshold, drift = _fit(probe, prompts, warm, skip, target, drift)
        measured = measure(probe, held_out_prompts, replace(skip, threshold=threshold))
        region = None if skip is skips[chosen] else (skip.cold_start, skip.cold_end)
        point = _point(target, threshold, region, measured)
        if _skips_more(point, points[-1:]):
            points.append(point)  # else: too few tokens to tell the two thresholds apart
    on_progress("done", total, total)
    config = runner.model.config
    return SkipProfile(
        fingerprint=fingerprint,
        model={
            "model_type": config.model_type,
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "dtype": runner.dtype,
        },
        cold_start=skips[chosen].cold_start,
        cold_end=skips[chosen].cold_end,
        warmup_tokens=warmup_tokens,
        num_prompts=len(prompts),
        num_tokens=len(similarities),
        points=tuple(points),
        similarity=_summary(similarities),
    )


# From similarities to settings -------------------------------------------------------------------


def candidate_regions(means: Sequence[float]) -> list[tuple[int, int]]:
    """Regions (cold_start, cold_end), each within the one before: the plateau, then without its
    worse end layer, and so on while there is still room to spare at REGION_RATIO; MAX_REGIONS of
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


def find_plateau(means: Sequence[float]) -> tuple[int, int]:
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


def _fit(
    probe: Probe,
    prompts: list[list[int]],
    similarities: Tensor,
    skip: SkipParams,
    target: float,
    drift: float,
) -> tuple[float, float]:
    """(threshold, drift): the threshold whose free generation comes nearest to the target.

    Skipping changes what later layers and tokens see, so the ratio drifts from the one that the
    full model's similarities foretell. The drift found for one target is the guess for the next.
    """
    limit = max_reachable_ratio(skip, probe.runner.num_layers)
    tries: list[tuple[float, float, float]] = []  # miss, threshold, drift
    for _ in range(MAX_TRIES):
        threshold = find_threshold(similarities, skip, min(target * drift, limit))
        ratio = free_skip_ratio(probe, prompts, replace(skip, threshold=threshold))
        tries.append((abs(ratio - target), threshold, drift))
        if abs(ratio - target) <= TOLERANCE:
            break
        drift *= min(2.0, target / ratio) if ratio else 2.0
    _, threshold, drift = min(tries)
    return threshold, drift


def _cost(probe: Probe, prompts: list[list[int]], similarities: Tensor, skip: SkipParams) -> float:
    """KL from the full model when the region of `skip` is used for REGION_RATIO."""
    threshold, _ = _fit(probe, prompts, similarities, skip, REGION_RATIO, 1.0)
    return measure(probe, prompts, replace(skip, threshold=threshold)).kl


def _point(
    target: float, threshold: float, region: tuple[int, int] | None, measured: Measurement
) -> SkipPoint:
    return SkipPoint(
        target_ratio=target,
        threshold=threshold,
        region=region,
        token_skip_ratio=round(measured.token_skip_ratio, DIGITS),
        top1_agreement=round(measured.top1_agreement, DIGITS),
        kl=round(max(0.0, measured.kl), DIGITS),
        trigger_layers=tuple(measured.trigger_layers),
        num_tokens=measured.num_free_tokens,
    )


def _skips_more(point: SkipPoint, before: list[SkipPoint]) -> bool:
    return point.token_skip_ratio > 0 and all(
        point.token_skip_ratio > other.token_skip_ratio
        and (point.region != other.region or point.threshold <= other.threshold)
        for other in before
    )


def _summary(similarities: Tensor) -> tuple[LayerSimilarity, ...]:
    means = similarities.mean(dim=0).tolist()
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    columns = similarities.quantile(quantiles, dim=0).T.tolist()
    names = ("p05", "p25", "p50", "p75", "p95")
    return tuple(
        LayerSimilarity(
            mean=_within_one(mean),
            **{name: _within_one(value) for name, value in zip(names, values, strict=True)},
        )
        for mean, values in zip(means, columns, strict=True)
    )


def _within_one(cosine: float) -> float:
    """Rounded; a cosine taken in fp32 may be a little beyond 1."""
    return round(max(-1.0, min(1.0, cosine)), DIGITS)
