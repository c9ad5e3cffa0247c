"""Rows that skip together: the rule of skip/consensus.py, with numbers made by hand."""

from __future__ import annotations

from dataclasses import replace

from skipllm_core.skip.consensus import ConsensusGate
from skipllm_core.types import SkipParams

SKIP = SkipParams(policy="ffn_skip", threshold=0.9, cold_start=1, cold_end=5)
NUM_LAYERS = 6


def skipped(gate: ConsensusGate, seen: list[list[float]]) -> list[list[int]]:
    """Runs a step; seen[layer][row] is what the layer does to the row if it runs."""
    for layer in range(NUM_LAYERS):
        if gate.rows_to_run(layer) and gate.watches(layer):
            gate.observe(layer, seen[layer])
    return gate.skipped_layers


def constant(*similarities: float) -> list[list[float]]:
    return [list(similarities) for _ in range(NUM_LAYERS)]


def test_rows_skip_together_once_all_have_triggered() -> None:
    seen = [[0.0, 0.0], [0.95, 0.5], [0.91, 0.6], [0.92, 0.93], [0.0, 0.0], [0.0, 0.0]]
    gate = ConsensusGate([SKIP, SKIP], share=1.0, slack=0.0)
    assert skipped(gate, seen) == [[4], [4]], "at layer 3, from the next one to the cold end"


def test_a_share_of_the_rows_is_enough_when_the_others_are_near() -> None:
    gate = ConsensusGate([SKIP] * 4, share=0.5, slack=0.05)
    assert skipped(gate, constant(0.95, 0.91, 0.86, 0.87)) == [[2, 3, 4]] * 4


def test_one_row_that_is_far_keeps_everybody_from_skipping() -> None:
    gate = ConsensusGate([SKIP] * 4, share=0.5, slack=0.05)
    assert skipped(gate, constant(0.95, 0.95, 0.95, 0.8)) == [[]] * 4


def test_triggers_add_up_over_the_layers() -> None:
    seen = [[0.0, 0.0], [0.95, 0.87], [0.87, 0.95], *constant(0.0, 0.0)[:3]]
    gate = ConsensusGate([SKIP, SKIP], share=1.0, slack=0.05)
    assert skipped(gate, seen) == [[3, 4], [3, 4]]


def test_rows_that_may_not_skip_have_no_say_and_run_everything() -> None:
    gate = ConsensusGate([SKIP, None], share=1.0, slack=0.0)
    assert skipped(gate, constant(0.95, 0.0)) == [[2, 3, 4], []]


def test_a_row_that_was_not_watched_is_not_spoken_for() -> None:
    late = replace(SKIP, cold_start=3)
    gate = ConsensusGate([SKIP, late], share=0.5, slack=1.0)
    assert skipped(gate, constant(0.95, 0.95)) == [[4], [4]]


def test_a_row_skips_no_more_than_its_limit() -> None:
    gate = ConsensusGate([SKIP, replace(SKIP, max_skips=1)], share=1.0, slack=0.0)
    assert skipped(gate, constant(0.95, 0.95)) == [[2, 3, 4], [2]]


def test_seven_of_25_rows_are_a_share_of_028() -> None:
    assert 0.28 * 25 > 7, "in binary"
    gate = ConsensusGate([SKIP] * 25, share=0.28, slack=0.1)
    assert skipped(gate, constant(*[0.95] * 7, *[0.85] * 18)) == [[2, 3, 4]] * 25
    gate = ConsensusGate([SKIP] * 25, share=0.28, slack=0.1)
    assert skipped(gate, constant(*[0.95] * 6, *[0.85] * 19)) == [[]] * 25


def test_a_row_that_is_not_a_number_keeps_everybody_from_skipping() -> None:
    gate = ConsensusGate([SKIP] * 3, share=0.5, slack=0.05)
    assert skipped(gate, constant(0.95, 0.95, float("nan"))) == [[]] * 3
