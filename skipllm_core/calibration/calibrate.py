"""Calibration: from a model and some prompts to its skip profile.

1. The full model answers the calibration prompts (greedily), and the similarity of every layer is
   recorded for every token it decodes.
2. For each target ratio a few regions of skippable layers are compared (`regions`): in each, the
   distribution of the similarities gives a first threshold, which free generation with skipping
   then corrects; the region is taken whose KL from the full model is lowest.
3. What was chosen is measured on held-out prompts: the ratio it gives in free generation, and how
   far its next-token distributions are from the full model's on the same text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from skipllm_core.calibration.measure import (
    Measurement,
    Recording,
    forced_kl,
    free_skip_ratio,
    measure,
    record,
)
from skipllm_core.calibration.probe import Probe, Prompts
from skipllm_core.calibration.regions import (
    DIGITS,
    SLACK,
    Region,
    candidates,
    find_plateau,
    find_threshold,
    max_reachable_ratio,
    nested_regions,
)
from skipllm_core.calibration.work import OnProgress, Options, Work, no_progress
from skipllm_core.config import EngineConfig
from skipllm_core.errors import ConfigError
from skipllm_core.model.fingerprint import model_fingerprint
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.skip.profile import FfnSkipPoint, LayerSimilarity, SkipProfile
from skipllm_core.types import SkipParams

TARGET_RATIOS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50)
BATCHES = (1, 4, 8, 16)  # that the weight skip ratio is told for
HELD_OUT_EVERY = 4  # one prompt of four is measured on, and not calibrated with
REGION_RATIO = 0.25  # whose region is the profile's own, for thresholds without a ratio
MAX_TRIES = 4  # per target
EXPECTED_TRIES = 2  # for the progress bar
TOLERANCE = 0.005  # of a ratio: no more tries are made


def calibrate_model(
    config: EngineConfig,
    prompts: Sequence[list[int]],
    options: Options,
    *,
    journal: Path | None = None,
    on_progress: OnProgress = no_progress,
) -> SkipProfile:
    """Loads the model and calibrates it on token-id prompts, of which every fourth is held out.

    What is done is kept in the file `journal`, for a run that follows an interruption; it is the
    caller's to remove.
    """
    if len(prompts) < 2:
        raise ConfigError("calibration needs at least two prompts: one of them is held out")
    fingerprint = model_fingerprint(config.model_dir)
    on_progress("loading the model", 0, 1)
    runner = TorchModelRunner(config)
    header = {
        "fingerprint": fingerprint,
        "dtype": runner.dtype,
        "device": runner.device,
        "max_num_seqs": config.max_num_seqs,
        "num_kv_blocks": runner.num_kv_blocks,
        "options": msgspec.to_builtins(options),
        "prompts": prompts,
    }
    return calibrate(
        runner,
        [prompt for n, prompt in enumerate(prompts) if n % HELD_OUT_EVERY],
        list(prompts[::HELD_OUT_EVERY]),
        options,
        fingerprint=fingerprint,
        max_num_seqs=config.max_num_seqs,
        work=Work(journal, header, on_progress),
    )


@torch.inference_mode()
def calibrate(
    runner: TorchModelRunner,
    prompts: Prompts,
    held_out_prompts: Prompts,
    options: Options,
    *,
    fingerprint: str,
    max_num_seqs: int = 32,
    work: Work | None = None,
) -> SkipProfile:
    """Raises ConfigError where the prompts do not fit the model, or the answers end so early that
    no token is decoded after the warm-up."""
    if runner.num_layers < 4:
        raise ConfigError(f"a model of {runner.num_layers} layers has no middle region to skip in")
    work = work or Work()
    probe = Probe(runner, max_tokens=options.max_tokens, max_num_seqs=max_num_seqs)
    calibration = _Calibration(probe, prompts, held_out_prompts, options, work)
    return calibration.profile(fingerprint)


class _Calibration:
    """One run of the three steps above."""

    def __init__(
        self,
        probe: Probe,
        prompts: Prompts,
        held_out_prompts: Prompts,
        options: Options,
        work: Work,
    ) -> None:
        self._probe = probe
        self._prompts = prompts
        self._held_out = held_out_prompts
        self._options = options
        self._work = work
        self._num_layers = probe.runner.num_layers
        self._drifts: dict[Region, float] = {}
        # A first guess: a pass to record, and for each target the tries and the measurements.
        self._expect([[(0, 0)] * 2 * len(SLACK)] * len(TARGET_RATIOS))

    def profile(self, fingerprint: str) -> SkipProfile:
        self._work.say("recording similarities")
        seen = record(self._probe, self._prompts, self._work)
        if not seen.similarities.isfinite().all():
            raise ConfigError("the model's values are not finite: it cannot be calibrated")
        warm = seen.similarities[seen.generated >= self._options.warmup_tokens]
        if not len(warm):
            raise ConfigError(
                f"every answer ended within the warm-up of {self._options.warmup_tokens} tokens: "
                "calibrate with other prompts or fewer --warmup-tokens"
            )
        regions = self._regions(seen.similarities.mean(dim=0).tolist())
        points = self._measure_targets(regions, warm)
        if not points:
            raise ConfigError(
                f"no skip ratio could be measured: the answers to {len(self._held_out)} held-out "
                "prompts are too short, or the region too narrow. Calibrate with more prompts"
            )
        near = min(points, key=lambda p: abs(p.target_ratio - REGION_RATIO))
        self._work.finish()
        config = self._probe.runner.model.config
        return SkipProfile(
            fingerprint=fingerprint,
            model={
                "model_type": config.model_type,
                "num_layers": config.num_layers,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "vocab_size": config.vocab_size,
                "dtype": self._probe.runner.dtype,
            },
            cold_start=near.region[0],
            cold_end=near.region[1],
            warmup_tokens=self._options.warmup_tokens,
            num_prompts=len(self._prompts),
            num_tokens=seen.num_tokens,
            ffn_skip=tuple(points),
            similarity=_summary(seen),
        )

    def _regions(self, means: list[float]) -> list[Region]:
        """What there is to choose from, narrow to wide."""
        start, end = self._options.cold_start, self._options.cold_end
        if start is None and end is None:
            return nested_regions(means)
        found = find_plateau(means)
        start, end = found[0] if start is None else start, found[1] if end is None else end
        if not 0 <= start < end - 1 < self._num_layers - 1:
            raise ConfigError(
                f"--cold-start {start} and --cold-end {end}: between them must be two layers or "
                f"more, without the last of {self._num_layers}"
            )
        return [(start, end)]

    def _measure_targets(self, regions: list[Region], similarities: Tensor) -> list[FfnSkipPoint]:
        """A point for each target ratio that a region reaches."""
        compared = {
            target: found
            for target in TARGET_RATIOS
            if (found := self._candidates(regions, target))
        }
        self._expect(compared.values())
        points: list[FfnSkipPoint] = []
        for target, found in compared.items():
            self._work.say(f"a skip ratio of {target:.0%}: comparing {len(found)} regions")
            skip = self._cheapest(similarities, found, target)
            self._work.say(f"a skip ratio of {target:.0%}: measuring it")
            measured = measure(self._probe, self._held_out, skip, self._work)
            point = _point(target, skip, measured)
            if _skips_more(point, points[-1:]):
                points.append(point)  # else: too few tokens to tell the two thresholds apart
        return points

    def _candidates(self, regions: list[Region], target: float) -> list[Region]:
        if len(regions) == 1:  # given: there is nothing to choose
            return [r for r in regions if target <= max_reachable_ratio(r, self._num_layers)]
        return candidates(regions, target, self._num_layers)

    def _cheapest(self, similarities: Tensor, regions: list[Region], target: float) -> SkipParams:
        """The settings that give the target ratio at the lowest KL on the calibration prompts."""
        skips = [
            self._fit(
                similarities,
                SkipParams(
                    policy="ffn_skip",
                    warmup_tokens=self._options.warmup_tokens,
                    cold_start=start,
                    cold_end=end,
                ),
                target,
            )
            for start, end in regions
        ]
        if len(skips) == 1:
            return skips[0]
        costs = [forced_kl(self._probe, self._prompts, s, self._work) for s in skips]
        return skips[costs.index(min(costs))]

    def _fit(self, similarities: Tensor, skip: SkipParams, target: float) -> SkipParams:
        """`skip` with the threshold whose free generation comes nearest to the target.

        Skipping changes what later layers and tokens see, so the ratio drifts from the one that the
        full model's similarities foretell. The drift found for one target is the guess for the
        region's next.
        """
        region = (skip.cold_start, skip.cold_end)
        limit = max_reachable_ratio(region, self._num_layers)
        drift = self._drifts.get(region, 1.0)
        tries: list[tuple[float, float, float]] = []  # miss, threshold, drift
        for _ in range(MAX_TRIES):
            threshold = find_threshold(similarities, skip, min(target * drift, limit))
            skipping = replace(skip, threshold=threshold)
            ratio = free_skip_ratio(self._probe, self._prompts, skipping, self._work)
            tries.append((abs(ratio - target), threshold, drift))
            if abs(ratio - target) <= TOLERANCE:
                break
            drift *= min(2.0, target / ratio) if ratio else 2.0
        self._work.total += (len(tries) - EXPECTED_TRIES) * len(self._prompts)
        _, threshold, self._drifts[region] = min(tries)
        return replace(skip, threshold=threshold)

    def _expect(self, compared: Collection[list[Region]]) -> None:
        """For the progress bar: tries of a row, comparisons of two, and measurements of three."""
        num_regions = sum(map(len, compared))
        num_costs = sum(len(found) for found in compared if len(found) > 1)
        of_prompts = 1 + EXPECTED_TRIES * num_regions + 2 * num_costs
        of_held_out = 3 * len(compared)
        self._work.total = of_prompts * len(self._prompts) + of_held_out * len(self._held_out)


def _point(target: float, skip: SkipParams, measured: Measurement) -> FfnSkipPoint:
    return FfnSkipPoint(
        target_ratio=target,
        threshold=skip.threshold,
        region=(skip.cold_start, skip.cold_end),
        skipped_ffn_share=round(measured.token_skip_ratio, DIGITS),
        weight_skip_ratio={
            batch: round(measured.weight_skip_ratio(batch), DIGITS) for batch in BATCHES
        },
        top1_agreement=round(measured.top1_agreement, DIGITS),
        kl=round(max(0.0, measured.kl), DIGITS),
        perplexity_change=round(measured.perplexity_change, DIGITS),
        trigger_layers=tuple(measured.trigger_layers),
        num_tokens=measured.num_free_tokens,
    )


def _skips_more(point: FfnSkipPoint, before: list[FfnSkipPoint]) -> bool:
    return point.skipped_ffn_share > 0 and all(
        point.skipped_ffn_share > other.skipped_ffn_share
        and (point.region != other.region or point.threshold <= other.threshold)
        for other in before
    )


def _summary(seen: Recording) -> tuple[LayerSimilarity, ...]:
    means = seen.similarities.mean(dim=0).tolist()
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    columns = seen.similarities.quantile(quantiles, dim=0).T.tolist()
    names = ("p05", "p25", "p50", "p75", "p95")
    return tuple(
        LayerSimilarity(
            mean=_within_one(mean),
            **{name: _within_one(value) for name, value in zip(names, values, strict=True)},
            block_influence=round(max(0.0, influence), DIGITS),
        )
        for mean, values, influence in zip(means, columns, seen.block_influence, strict=True)
    )


def _within_one(cosine: float) -> float:
    """Rounded; a cosine taken in fp32 may be a little beyond 1."""
    return round(max(-1.0, min(1.0, cosine)), DIGITS)
