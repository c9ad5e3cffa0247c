"""Calibration: the rules on numbers written by hand, and end to end on a tiny random model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skipllm_core.errors import ConfigError
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.skip.calibrate import (
    calibrate,
    candidate_regions,
    find_plateau,
    find_threshold,
    max_reachable_ratio,
)
from skipllm_core.skip.measure import Probe, measure, record
from skipllm_core.skip.policy import FfnSkipGate
from skipllm_core.skip.profile import SkipDefaults, SkipOptions, SkipProfile, resolve_skip
from skipllm_core.types import SamplingParams, SkipParams
from tests.runner.tiny import engine_config, generate, write_config

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


def test_regions_to_compare_lose_their_worse_end_one_by_one() -> None:
    means = [0.2, 0.99, 0.98, 0.97, 0.96, 0.96, 0.96, 0.96, 0.95, 0.96, 0.94, 0.2]
    # Five layers are the fewest that can skip 30 % of twelve: four, and one that triggers. Of the
    # six regions down to there, five are compared.
    assert candidate_regions(means) == [(1, 11), (1, 10), (1, 9), (1, 7), (1, 6)]
    assert candidate_regions(means[::-1]) == [(1, 11), (2, 11), (3, 11), (5, 11), (6, 11)]


def test_of_many_regions_a_few_are_compared_from_the_widest_to_the_narrowest() -> None:
    regions = candidate_regions([0.99] * 80)
    assert len(regions) == 5
    assert [end - start for start, end in regions] == [78, 65, 52, 38, 25]


def test_a_plateau_too_narrow_to_choose_from_is_taken_as_it_is() -> None:
    means = [0.1, 0.2, 0.3, 0.99, 0.99, 0.99, 0.3, 0.2, 0.1]
    assert candidate_regions(means) == [(3, 6)]


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
    assert max_reachable_ratio(SkipParams(cold_start=4, cold_end=7), NUM_LAYERS) == 2 / NUM_LAYERS
    assert max_reachable_ratio(SkipParams(cold_start=4, cold_end=4), NUM_LAYERS) == 0


# End to end --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    return write_config(path, num_hidden_layers=NUM_LAYERS, eos_token_id=None)


@pytest.fixture(scope="module")
def runner(model_dir: Path) -> TorchModelRunner:
    return TorchModelRunner(engine_config(model_dir))


def prompts(count: int, seed: int) -> list[list[int]]:
    ids = torch.randint(3, 96, (count, 9), generator=torch.Generator().manual_seed(seed))
    return [row[: 3 + n % 7].tolist() for n, row in enumerate(ids)]


@pytest.fixture(scope="module")
def profile(runner: TorchModelRunner) -> SkipProfile:
    return calibrate(
        runner,
        prompts(8, seed=1),
        prompts(6, seed=2),
        fingerprint="abc",
        max_num_seqs=12,
        max_tokens=16,
        warmup_tokens=2,
    )


def test_calibration_tells_what_skipping_does_to_the_model(profile: SkipProfile) -> None:
    assert profile.num_layers == NUM_LAYERS
    assert profile.num_tokens == 8 * 15
    assert profile.warmup_tokens == 2
    assert len(profile.points) >= 3
    for point in profile.points:
        assert point.num_tokens == 6 * 14
        assert sum(point.trigger_layers) <= point.num_tokens
        assert point.token_skip_ratio == pytest.approx(point.target_ratio, abs=0.1)
        assert 0 < point.top1_agreement < 1  # a random model is no robust one
        assert point.kl > 0
        start, end = profile.region_at(point)
        assert point.target_ratio <= (end - 1 - start) / NUM_LAYERS, "the region reaches the target"
        reach = (profile.cold_end - 1 - profile.cold_start) / NUM_LAYERS
        assert (point.region is None) == (point.target_ratio <= reach), "wider only where needed"
    assert all(layer.p05 <= layer.p50 <= layer.p95 for layer in profile.similarity)


def test_a_profile_can_be_saved_loaded_and_served(
    profile: SkipProfile, runner: TorchModelRunner, model_dir: Path, tmp_path: Path
) -> None:
    profile.save(tmp_path / "skip.yaml")
    loaded = SkipProfile.load(tmp_path / "skip.yaml")
    ratio = loaded.points[1].token_skip_ratio
    skip = resolve_skip(SkipDefaults(), loaded, SkipOptions(ratio=ratio))
    params = SamplingParams(max_tokens=16, temperature=0, skip=skip)
    requests = [(prompt, params) for prompt in prompts(6, seed=2)]
    outputs = generate(runner, engine_config(model_dir), requests)
    usages = [row[-1].skip_usage for row in outputs]
    # The held-out prompts again, so what was measured comes out: over the 14 of 15 decoded tokens
    # that follow the warm-up.
    skipped = sum(usage.skipped_ffn_blocks for usage in usages)
    assert skipped / (6 * 14 * NUM_LAYERS) == pytest.approx(ratio, abs=1e-4)


def test_never_skipping_agrees_with_itself(runner: TorchModelRunner) -> None:
    skip = SkipParams(policy="ffn_skip", threshold=2.0, cold_end=NUM_LAYERS, warmup_tokens=0)
    result = measure(Probe(runner, max_tokens=8, max_num_seqs=9), prompts(4, seed=3), skip)
    assert result.token_skip_ratio == 0
    assert result.top1_agreement == 1
    assert result.kl == pytest.approx(0, abs=1e-5)


def test_groups_do_not_change_what_is_measured(
    profile: SkipProfile, runner: TorchModelRunner
) -> None:
    skip = resolve_skip(SkipDefaults(), profile, SkipOptions(ratio=0.2))
    all_at_once, one_by_one = (
        measure(Probe(runner, max_tokens=8, max_num_seqs=limit), prompts(4, seed=3), skip)
        for limit in (12, 3)
    )
    assert one_by_one.trigger_layers == all_at_once.trigger_layers
    assert one_by_one.num_skipped == all_at_once.num_skipped > 0
    assert one_by_one.sum_kl == pytest.approx(all_at_once.sum_kl, rel=1e-3)


def test_progress_is_told(runner: TorchModelRunner) -> None:
    told = []
    calibrate(
        runner,
        prompts(4, seed=1),
        prompts(1, seed=2),
        fingerprint="abc",
        max_tokens=4,
        warmup_tokens=0,
        on_progress=lambda what, done, total: told.append((done, total)),
    )
    assert told[0] == (0, 9)
    assert told[-1] == (9, 9)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_num_seqs": 2}, "side by side"),
        ({"warmup_tokens": 99}, "within the warm-up"),
    ],
)
def test_calibration_that_cannot_work_is_refused(
    runner: TorchModelRunner, changes: dict[str, int], says: str
) -> None:
    settings = {"max_tokens": 6, "warmup_tokens": 0, "max_num_seqs": 8} | changes
    with pytest.raises(ConfigError, match=says):
        calibrate(runner, prompts(2, 1), prompts(2, 2), fingerprint="abc", **settings)


def test_an_answer_ends_where_the_context_does(runner: TorchModelRunner) -> None:
    """The first token comes with the prompt, the last takes the last place: two are decoded."""
    probe = Probe(runner, max_tokens=10**6, max_num_seqs=2)
    similarities, generated = record(probe, [[1] * (runner.max_model_len - 3)])
    assert len(similarities) == len(generated) == 2
    with pytest.raises(ConfigError, match="leaves no room"):
        record(probe, [[1] * (runner.max_model_len - 1)])


def test_a_gate_follows_the_word_by_word_rule() -> None:
    """The two statements of the rule, ours on tensors and the paper's, agree on random curves."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        row = torch.rand(NUM_LAYERS, generator=generator)
        skip = SkipParams(policy="ffn_skip", threshold=0.8, cold_start=2, cold_end=10)
        gate = FfnSkipGate([skip])
        for layer, cosine in enumerate(row.tolist()):
            if gate.rows_to_run(layer):
                gate.observe(layer, [cosine])
        assert len(gate.skipped_layers[0]) == num_skips(row.tolist(), skip)
