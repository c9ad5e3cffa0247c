"""Rows whose skipped blocks are known before the step (static, random) beside rows that find
theirs, over several steps and with holes in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skipllm_core.kernels.gpu.rows import RowPolicy
from skipllm_core.skip.baselines import PlannedSkip
from skipllm_core.skip.policy import RowGate, SkipRule
from skipllm_core.types import SkipParams
from tests.kernels.gpu.twins import PADDING, POSITIONS, close, twins

NUM_LAYERS = 5
# Sequences 0 .. 4 stand in these rows; row 2 and the last are padded.
WHICH = [0, 1, PADDING, 2, 3, PADDING]
REAL = [n for n in WHICH if n != PADDING]
ADAPTIVE = SkipParams(policy="ffn_skip", threshold=-1.0, cold_start=1, cold_end=4)

# Of each step, what the masks of sequences 0 and 2 skip; sequence 1 finds it itself, 3 never skips.
PLANS: list[dict[int, set[int]]] = [
    {0: {1, 3}, 2: {0, 1, 2}},
    {0: {1, 3}, 2: set()},
    {0: {1, 3}, 2: {4}},
]


@pytest.mark.parametrize("warm_up", [0, 1, 2])
def test_mixed_rows_skip_what_the_host_gate_skips_step_after_step(
    warm_up: int, tmp_path: Path, device: torch.device
) -> None:
    """`warm_up`: of sequences 0 and 1, in steps; sequence 2 has none."""
    pair = twins(tmp_path, device, num_hidden_layers=NUM_LAYERS)
    rows = pair.rows
    pair.place(WHICH)
    rows.mask.fill_(1)  # nobody's, and of those that have none: must not be looked at
    rows.policies.fill_(RowPolicy.MASK)
    pair.set_skip(1, ADAPTIVE)
    pair.set_skip(4, None)
    for row, n in ((0, 0), (1, 1)):
        rows.skip_from[row] = POSITIONS[n] + warm_up
    for step, plan in enumerate(PLANS):
        rules: list[SkipRule | None] = []
        for row, n in enumerate(WHICH):
            if n == PADDING:
                continue
            rows.positions[row] = POSITIONS[n] + step
            is_warm = n == 2 or step >= warm_up
            if n in plan:
                layers = plan[n]
                rows.mask[row] = 0
                rows.mask[row, list(layers)] = 1
                rules.append(PlannedSkip(frozenset(layers)) if is_warm else None)
            else:
                rules.append(ADAPTIVE if n == 1 and is_warm else None)
        gate = RowGate(rules)
        expected = pair.eager(REAL, gate, ahead=step)
        found = pair.step(len(WHICH), "skip")
        real = [row for row, n in enumerate(WHICH) if n != PADDING]
        close(found[real], expected)
        skipped = pair.skipped(len(WHICH))
        assert [skipped[row] for row in real] == gate.skipped_layers
        assert [skipped[row] for row, n in enumerate(WHICH) if n == PADDING] == [[], []]
        needed = [sum(layer not in mine for mine in gate.skipped_layers) for layer in range(5)]
        assert rows.num_needed.tolist() == needed, "padding keeps no layer awake"


def test_a_layer_whose_rows_skip_for_different_reasons_is_not_read(
    tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device, num_hidden_layers=NUM_LAYERS)
    pair.place([0, 1, PADDING])
    pair.rows.policies[0] = RowPolicy.MASK
    pair.rows.mask[0, [2, 3]] = 1
    pair.set_skip(1, ADAPTIVE)  # triggers at layer 1
    pair.set_skip(2, None)
    for layer in (2, 3):
        pair.model.blocks[layer].ffn.gate_up.weight.fill_(torch.nan)
        pair.model.blocks[layer].ffn.down.weight.fill_(torch.nan)
    assert pair.step(3, "skip")[:2].isfinite().all()
    assert pair.rows.num_needed.tolist() == [2, 2, 0, 0, 2]
