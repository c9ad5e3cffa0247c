"""The plans of the compared policies, in numbers written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skipllm_core.sequence import Sequence
from skipllm_core.skip.baselines import PlannedSkip, best_layers, exit_at, exit_range
from skipllm_core.skip.consensus import ConsensusGate
from skipllm_core.skip.policy import gate_for, skip_at
from skipllm_core.types import SamplingParams, SkipParams

STATIC = SkipParams(policy="static", layers=(2, 4), warmup_tokens=2)
RANDOM = SkipParams(policy="random", probability=0.5, warmup_tokens=0, cold_start=1, cold_end=9)
DROP = SkipParams(policy="layer_drop", layers=(1, 3), warmup_tokens=0)
EXIT = SkipParams(
    policy="early_exit", first_exit=8, cold_start=4, cold_end=8, budget_tokens=9, warmup_tokens=0
)
NUM_PROMPT_TOKENS = 5


def plan(skip: SkipParams, generated: int, seed: int = 7) -> PlannedSkip | None:
    """Of the token whose decoding generates output token `generated`."""
    seq = Sequence(0, [1] * NUM_PROMPT_TOKENS, SamplingParams(max_tokens=20, seed=seed, skip=skip))
    rule = skip_at(seq, NUM_PROMPT_TOKENS - 1 + generated)
    assert not isinstance(rule, SkipParams)
    return rule


def test_static_skips_the_same_blocks_after_the_warm_up() -> None:
    assert [plan(STATIC, t) for t in (-1, 0, 1)] == [None, None, None]
    assert plan(STATIC, 2) == plan(STATIC, 9) == PlannedSkip(frozenset({2, 4}))


def test_layer_drop_skips_its_layers_in_the_prompt_too() -> None:
    expected = PlannedSkip(frozenset({1, 3}), whole_layers=True)
    assert [plan(DROP, t) for t in (-4, 0, 1, 9)] == [expected] * 4


def test_random_skips_its_share_of_the_region_and_nothing_else() -> None:
    plans = [plan(RANDOM, t, seed) for t in range(1, 200) for seed in range(5)]
    layers = [layer for one in plans if one is not None for layer in one.layers]
    assert set(layers) == set(range(1, 9))
    assert len(layers) / len(plans) == pytest.approx(4, rel=0.05), "half of 8"
    assert plan(RANDOM, 0) is None


def test_random_draws_again_what_it_drew() -> None:
    draws = [plan(RANDOM, t, seed) for t in range(1, 20) for seed in (7, 8)]
    assert draws == [plan(RANDOM, t, seed) for t in range(1, 20) for seed in (7, 8)]
    assert len(set(draws)) > 30, "tokens and seeds differ"
    assert all(plan(replace(RANDOM, probability=1.0), t) is not None for t in range(1, 9))
    assert all(plan(replace(RANDOM, probability=0.0), t) is None for t in range(1, 9))


@pytest.mark.parametrize(
    ("generated", "exit_layer"),
    [(0, 8), (1, 8), (2, 7), (3, 6), (4, 6), (5, 6), (6, 5), (7, 4), (8, 4), (9, 4), (99, 4)],
)
def test_the_exit_falls_in_a_line_until_the_budget_is_spent(
    generated: int, exit_layer: int
) -> None:
    assert exit_at(generated, 9, 8, 4) == exit_layer


def test_early_exit_leaves_out_what_lies_behind_the_exit() -> None:
    assert plan(EXIT, 0) is None, "the first token comes with the prompt, in full"
    assert plan(EXIT, 2) == PlannedSkip(frozenset({7}), whole_layers=True)
    assert plan(EXIT, 8) == PlannedSkip(frozenset({4, 5, 6, 7}), whole_layers=True)
    by_max_tokens = replace(EXIT, budget_tokens=None)  # 20
    assert plan(by_max_tokens, 8) == PlannedSkip(frozenset({6, 7}), whole_layers=True)


@pytest.mark.parametrize(
    ("ratio", "num_layers", "expected"),
    [
        (0.25, 32, (32, 16)),
        (0.20, 30, (30, 18)),
        (0.05, 12, (12, 11)),
        (0.50, 12, (11, 1)),  # the last token keeps a layer, so the first cannot have all
        (0.75, 12, (5, 1)),
    ],
)
def test_the_exits_mean_is_the_ratio(
    ratio: float, num_layers: int, expected: tuple[int, int]
) -> None:
    assert exit_range(ratio, num_layers) == expected
    assert 1 - sum(expected) / 2 / num_layers == pytest.approx(ratio, abs=0.5 / num_layers)


def test_the_best_layers_are_the_highest_and_of_equals_the_lower() -> None:
    values = [0.9, 0.5, 0.7, 0.7, 0.9, 0.1]
    assert best_layers(values, 0.5, range(6)) == (0, 2, 4)
    assert best_layers(values, 0.5, range(1, 5)) == (2, 3, 4)
    assert best_layers(values, 0.05, range(6)) == ()


def test_rows_of_all_policies_share_a_gate() -> None:
    adaptive = SkipParams(policy="ffn_skip", threshold=0.9, cold_start=1, cold_end=5)
    rows = [
        None,
        adaptive,
        PlannedSkip(frozenset({2, 4})),
        PlannedSkip(frozenset({1, 5}), whole_layers=True),
    ]
    for gate in (gate_for(rows), ConsensusGate(rows, share=0.5, slack=0.0)):
        ran = []
        for layer in range(6):
            ran.append(list(gate.rows_to_run(layer)))
            if gate.watches(layer):
                gate.observe(layer, [0.99, 0.95, 0.99, 0.99])
        assert ran == [[0, 1, 2, 3], [0, 1, 2], [0, 3], [0, 2, 3], [0, 3], [0, 1, 2]]
        assert gate.skipped_layers == [[], [2, 3, 4], [2, 4], [1, 5]]
        assert list(gate.whole_layer_rows) == [3]
