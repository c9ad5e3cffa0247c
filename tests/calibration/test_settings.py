"""Settings for a ratio: by regions that are tried out, and by scores."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from skipllm_core.calibration.ffn_skip import RegionSearch
from skipllm_core.calibration.measure import Measurement
from skipllm_core.calibration.neurons import neurons_skip, shares_for
from skipllm_core.calibration.regions import share_skipped
from skipllm_core.types import SkipParams

NUM_LAYERS = 12


def measured(share: float, kl: float) -> Measurement:
    return Measurement(100, share, {1: share}, 0.9, kl, 0.1, [], [])


class Trials:
    """Measurements as they might be: of each region, how much of the foretold ratio it gives, and
    the KL at ratio 1."""

    def __init__(self, drift: float, cost: dict[tuple[int, int], float]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.similarities = torch.rand(2000, NUM_LAYERS, generator=generator)
        self.tried: list[list[SkipParams]] = []
        self._drift = drift
        self._cost = cost

    def search(self) -> RegionSearch:
        return RegionSearch(self.similarities, self.similarities[:500], 3, self._try_out)

    def _try_out(self, skips: Sequence[SkipParams]) -> list[Measurement]:
        self.tried.append(list(skips))
        return [self._measure(skip) for skip in skips]

    def _measure(self, skip: SkipParams) -> Measurement:
        share = self._drift * share_skipped(self.similarities[:500], skip)
        kl = self._cost.get((skip.cold_start, skip.cold_end), 1.0) * share**1.5
        return measured(share, kl)

    def ratio(self, skip: SkipParams) -> float:
        return self._drift * share_skipped(self.similarities, skip)


REGIONS = [(3, 9), (2, 10), (1, 11)]


@pytest.mark.parametrize("best", REGIONS)
def test_the_region_of_the_lowest_kl_is_taken(best: tuple[int, int]) -> None:
    trials = Trials(1.0, {best: 0.9})
    skip = trials.search().cheapest(REGIONS, 0.25)
    assert (skip.cold_start, skip.cold_end, skip.warmup_tokens) == (*best, 3)
    assert trials.ratio(skip) == pytest.approx(0.25, abs=0.005)
    assert len(trials.tried) == 1, "the ratio came as foretold"


@pytest.mark.parametrize("drift", [0.7, 1.25])
def test_a_threshold_is_corrected_by_the_drift_and_the_next_one_knows_it(drift: float) -> None:
    trials = Trials(drift, {})
    search = trials.search()
    for target, num_tries in ((0.2, 2), (0.25, 1)):
        trials.tried.clear()
        skip = search.cheapest(REGIONS[1:2], target)
        assert trials.ratio(skip) == pytest.approx(target, abs=0.005)
        assert len(trials.tried) == num_tries


def test_a_region_that_skips_nothing_is_not_taken() -> None:
    trials = Trials(0.0, {})
    assert trials.search().cheapest(REGIONS, 0.1).policy == "ffn_skip"  # and so it is said later


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.65])
def test_thresholds_leave_out_the_share_of_weights_that_was_asked_for(share: float) -> None:
    before_up, before_down = shares_for(share)
    assert before_up == pytest.approx(before_down**2)
    # Rows of gate, up and down: the first is always read.
    assert (before_up + before_down) / 3 == pytest.approx(share)

    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(2, 50_000, generator=generator) ** power for power in (1, 5)]
    skip = neurons_skip(scores, share, warmup_tokens=4)
    assert (skip.policy, skip.warmup_tokens) == ("neurons", 4)
    for (first, second), up, down in zip(
        scores, skip.up_thresholds, skip.down_thresholds, strict=True
    ):
        no_up = first < up
        no_down = no_up | (second < down)
        assert float(no_up.float().mean()) == pytest.approx(before_up, abs=1e-3)
        assert float(no_down.float().mean()) == pytest.approx(before_down, abs=1e-3)


def test_a_share_of_nothing_leaves_nothing_out() -> None:
    skip = neurons_skip([torch.rand(2, 100)], 0.0, warmup_tokens=0)
    assert (skip.up_thresholds, skip.down_thresholds) == ((0.0,), (0.0,))
