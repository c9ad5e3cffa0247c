"""Regions and thresholds: the rules on numbers written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skipllm_core.calibration.regions import (
    candidates,
    find_plateau,
    find_threshold,
    max_reachable_ratio,
    nested_regions,
)
from skipllm_core.skip.policy import RowGate
from skipllm_core.types import SkipParams

NUM_LAYERS = 12


@pytest.mark.parametrize(
    ("means", "region"),
    [
        # The shape of the paper's curve: low at first, a plateau, a fall at the end.
        ([0.14, 0.94, 0.985, 0.99, 0.99, 0.992, 0.99, 0.99, 0.99, 0.99, 0.99, 0.94], (2, 11)),
        # The first and the last layer are cold even on the plateau.
        ([0.99] * 8, (1, 7)),
        # A layer off the plateau parts the middle; the longer side is taken.
        ([0.2, 0.99, 0.99, 0.60, 0.99, 0.99, 0.99, 0.2], (4, 7)),
        ([0.2, 0.99, 0.99, 0.99, 0.60, 0.99, 0.99, 0.2], (1, 4)),
    ],
)
def test_the_cold_regions_end_where_the_plateau_begins(
    means: list[float], region: tuple[int, int]
) -> None:
    assert find_plateau(means) == region


def test_regions_are_nested_from_one_layer_to_all_but_the_first_and_the_last() -> None:
    means = [0.1, 0.2, 0.96, 0.99, 0.98, 0.97, 0.4, 0.5, 0.1]
    assert find_plateau(means) == (2, 6)
    narrower, wider = [(3, 4), (3, 5), (3, 6)], [(2, 7), (2, 8), (1, 8)]
    assert nested_regions(means) == [*narrower, (2, 6), *wider]
    assert nested_regions(means[::-1]) == [(5, 6), (4, 6), (3, 6), (3, 7), (2, 7), (1, 7), (1, 8)]


@pytest.mark.parametrize(
    ("num_layers", "target", "sizes"),
    [
        (12, 0.25, [4, 5, 6]),  # three skip, and one triggers
        (12, 0.05, [2, 3, 4]),
        (12, 0.6, [9, 10]),
        (32, 0.25, [9, 12, 15]),
        (12, 0.9, []),
    ],
)
def test_compared_are_the_narrowest_region_that_reaches_a_ratio_and_some_with_slack(
    num_layers: int, target: float, sizes: list[int]
) -> None:
    regions = nested_regions([0.99] * num_layers)
    found = candidates(regions, target, num_layers)
    assert [end - start for start, end in found if start > 0] == sizes
    earlier = [end - start for start, end in found if start == 0]  # the plateau begins at 1
    assert earlier[: len(sizes)] == sizes
    assert len(set(found)) == len(found)


def random_curves(count: int) -> torch.Tensor:
    return torch.rand(count, NUM_LAYERS, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.25, 0.5, 8 / NUM_LAYERS])
def test_a_threshold_gives_its_ratio_when_the_rule_is_applied(ratio: float) -> None:
    curves = 0.9 + 0.1 * random_curves(400)
    skip = SkipParams(policy="ffn_skip", cold_start=2, cold_end=11)
    skip = replace(skip, threshold=find_threshold(curves, skip, ratio))
    num_skipped = sum(num_skips(row.tolist(), skip) for row in curves)
    assert num_skipped / (400 * NUM_LAYERS) == pytest.approx(ratio, abs=2e-3)


def num_skips(similarities: list[float], skip: SkipParams) -> int:
    """The rule as in the paper, word by word."""
    triggered, skipped = False, 0
    for layer, value in enumerate(similarities):
        if skip.cold_start <= layer < skip.cold_end:
            if triggered:
                skipped += 1
            elif value >= skip.threshold:
                triggered = True
    return skipped


def test_the_most_that_can_be_skipped_spares_the_layer_that_triggers() -> None:
    assert max_reachable_ratio((4, 7), NUM_LAYERS) == 2 / NUM_LAYERS
    assert max_reachable_ratio((4, 4), NUM_LAYERS) == 0


def test_a_gate_follows_the_word_by_word_rule() -> None:
    """The two statements of the rule, ours on tensors and the paper's, agree on random curves."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        row = torch.rand(NUM_LAYERS, generator=generator)
        skip = SkipParams(policy="ffn_skip", threshold=0.8, cold_start=2, cold_end=10)
        gate = RowGate([skip])
        for layer, cosine in enumerate(row.tolist()):
            if gate.rows_to_run(layer):
                gate.observe(layer, [cosine])
        assert len(gate.skipped_layers[0]) == num_skips(row.tolist(), skip)
