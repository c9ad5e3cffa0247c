"""The whole decode step of the kernels against the eager one, and the gate on the device against
the gate on the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skipllm_core.kernels.gpu.rows import RowPolicy
from skipllm_core.skip.baselines import PlannedSkip
from skipllm_core.skip.consensus import ConsensusGate
from skipllm_core.skip.neurons import NeuronSkip
from skipllm_core.skip.policy import ForcedGate, NeverGate, RowGate, SkipRule
from skipllm_core.types import SkipParams
from tests.kernels.gpu.twins import PADDING, POSITIONS, Twins, close, similarities_of, twins
from tests.model.checkpoints import CHECKPOINTS


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_every_familys_step_equals_the_eager_one(
    name: str, num_rows: int, tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device, name, num_hidden_layers=3)
    which = [2, 0, 4][:num_rows]
    pair.place(which)
    close(pair.step(num_rows, "stock"), pair.eager(which, NeverGate(num_rows)))
    pair.assert_caches_agree(which)
    assert pair.skipped(num_rows) == [[]] * num_rows
    assert pair.rows.num_needed.tolist() == [num_rows] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_heads_of_every_size(
    head_dim: int, dtype: torch.dtype, tmp_path: Path, device: torch.device
) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("tl.dot of bfloat16 is for devices")
    changes = {"head_dim": head_dim, "num_hidden_layers": 1}
    pair = twins(tmp_path, device, "llama_head_dim", dtype=dtype, **changes)
    pair.place([4, 0])
    found, expected = pair.step(2, "stock"), pair.eager([4, 0], NeverGate(2))
    # Against the largest logit: each is a sum whose terms were rounded.
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def test_the_skipping_step_without_skippers_equals_the_stock_one_bit_for_bit(
    tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device)
    pair.place([0, 1, 2])
    stock = pair.step(3, "stock").clone()
    assert torch.equal(pair.step(3, "skip"), stock)
    assert pair.skipped(3) == [[]] * 3


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 0, 0, 0, 0]] * 3,
        [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]],
        [[0, 1, 1, 1, 0]] * 3,
        [[1, 1, 1, 1, 1]] * 3,
    ],
    ids=["none", "some", "all_of_a_layer", "every_block"],
)
def test_forced_masks_skip_what_the_host_gate_skips(
    mask: list[list[int]], tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device, num_hidden_layers=5)
    pair.place([0, 1, 2])
    for row in range(3):
        pair.rows.policies[row] = RowPolicy.MASK
        pair.rows.mask[row] = torch.tensor(mask[row], dtype=torch.int32)
    gate = ForcedGate([[bool(skips) for skips in row] for row in mask])
    expected = pair.eager([0, 1, 2], gate)
    if all(all(row) for row in zip(*mask, strict=True)):
        for block in pair.model.blocks:  # whoever reads them shows it
            block.ffn.gate_up.weight.fill_(torch.nan)
            block.ffn.down.weight.fill_(torch.nan)
    close(pair.step(3, "skip"), expected)
    assert pair.skipped(3) == gate.skipped_layers
    assert pair.rows.num_needed.tolist() == [3 - sum(layer) for layer in zip(*mask, strict=True)]


def test_rows_trigger_where_the_host_gate_triggers(tmp_path: Path, device: torch.device) -> None:
    pair = twins(tmp_path, device, num_hidden_layers=7)
    which = [0, 1, 2, 3, 4]
    seen = similarities_of(pair, which)
    # Between the similarities of a row, and away from them: rounding decides nothing.
    settings: list[SkipParams | None] = [None]
    for row, max_skips in ((1, None), (2, None), (3, 2), (4, None)):
        ranked = sorted(seen[layer][row] for layer in range(1, 5))
        threshold = (ranked[-1 - row % 2] + ranked[-2 - row % 2]) / 2
        skip = SkipParams(policy="ffn_skip", threshold=threshold, cold_start=1, cold_end=6)
        settings.append(replace(skip, max_skips=max_skips))
    pair.place(which)
    for row, skip in enumerate(settings):
        pair.set_skip(row, skip)
    gate = RowGate(settings)
    close(pair.step(5, "skip"), pair.eager(which, gate))
    assert pair.skipped(5) == gate.skipped_layers
    assert len({tuple(layers) for layers in gate.skipped_layers}) >= 3, "rows that differ"
    assert pair.skipped(5)[0] == []


def test_a_row_in_its_warm_up_runs_every_layer(tmp_path: Path, device: torch.device) -> None:
    pair = twins(tmp_path, device, num_hidden_layers=5)
    skip = SkipParams(policy="ffn_skip", threshold=-1.0, cold_start=1, cold_end=4)
    pair.place([0, 2])
    for row in range(2):
        pair.set_skip(row, skip)
    pair.rows.skip_from[0] = POSITIONS[0] + 1
    pair.rows.skip_from[1] = POSITIONS[2]
    pair.step(2, "skip")
    assert pair.skipped(2) == [[], [2, 3]]


def test_a_row_is_what_it_is_alone_and_padding_changes_nothing(
    tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device, num_hidden_layers=5)
    skip = SkipParams(policy="ffn_skip", threshold=-1.0, cold_start=1, cold_end=4)
    pair.place([0, 1])
    pair.set_skip(0, skip)
    pair.set_skip(1, None)
    two = pair.step(2, "skip").clone()
    skipped = pair.skipped(2)
    pair.place([0, 1, PADDING, PADDING])
    for row in (2, 3):
        pair.set_skip(row, None)
    four = pair.step(4, "skip").clone()
    assert torch.equal(four[:2], two)
    assert pair.skipped(2) == skipped == [[2, 3], []]
    assert pair.rows.num_needed.tolist() == [2, 2, 1, 1, 2]
    pair.place([0, PADDING])
    pair.step(2, "skip")
    assert pair.rows.num_needed.tolist() == [1, 1, 0, 0, 1], "padding keeps no layer awake"


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("slack", [0.0, 2.0])
def test_the_consensus_is_the_host_gates(
    share: float, slack: float, tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device, consensus=True, num_hidden_layers=6)
    which = [0, 1, 2, 3]
    seen = similarities_of(pair, which)
    settings: list[SkipParams | None] = []
    for row in range(3):
        ranked = sorted(seen[layer][row] for layer in range(1, 4))
        middle = (ranked[row % 2] + ranked[row % 2 + 1]) / 2
        settings.append(SkipParams(policy="ffn_skip", threshold=middle, cold_start=1, cold_end=5))
    settings.append(None)  # in its warm-up: runs everything, and has no say
    pair.place(which)
    for row, skip in enumerate(settings):
        pair.set_skip(row, skip)
    pair.rows.consensus.copy_(torch.tensor([share, slack]))
    gate = ConsensusGate(settings, share=share, slack=slack)
    close(pair.step(4, "skip"), pair.eager(which, gate))
    assert pair.skipped(4) == gate.skipped_layers
    assert pair.skipped(4)[3] == []
    if slack == 2.0 and share == 0.3:
        assert any(gate.skipped_layers)


def neuron_rule(pair: Twins, seed: int) -> NeuronSkip:
    """Thresholds of some neurons in every layer but the second, more before down."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(32, pair.model.config.hidden_size, generator=generator)
    up, down = [], []
    for layer, block in enumerate(pair.model.blocks):
        gate, raised = block.ffn.gate_up(block.norm2(h.to(pair.device))).chunk(2, dim=-1)
        scores = torch.nn.functional.silu(gate).abs() * block.ffn.down_norms
        share = 0.0 if layer == 1 else 0.3 + 0.1 * seed
        up.append(float(scores.quantile(share)) if share else 0.0)
        down.append(float((scores * raised.abs()).quantile(share)) if share else 0.0)
    return NeuronSkip(tuple(up), tuple(down))


@pytest.mark.parametrize(
    ("name", "num_rows"), [(name, 1 + 2 * (n % 2)) for n, name in enumerate(sorted(CHECKPOINTS))]
)
def test_every_familys_step_leaves_out_what_the_eager_one_does(
    name: str, num_rows: int, tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device, name, num_hidden_layers=3)
    which = [2, 0, 4][:num_rows]
    rules = [neuron_rule(pair, 0), None, neuron_rule(pair, 2)][:num_rows]
    pair.place(which)
    for row, rule in enumerate(rules):
        pair.set_neurons(row, rule)
    gate = RowGate(rules)
    close(pair.step(num_rows, "neurons"), pair.eager(which, gate))
    pair.assert_caches_agree(which)
    pair.assert_neurons_are(gate)


@pytest.mark.parametrize("consensus", [False, True])
def test_all_policies_side_by_side(consensus: bool, tmp_path: Path, device: torch.device) -> None:
    """Two rows leave out neurons, one is in its warm-up for that, one skips planned blocks, one
    those behind its trigger, and the last slot is padded."""
    pair = twins(tmp_path, device, consensus=consensus, num_hidden_layers=4)
    which = [0, 1, 2, 3, 4, PADDING]
    pair.place(which)
    first, second = neuron_rule(pair, 0), neuron_rule(pair, 1)
    rules: list[SkipRule | None] = [first, second, None, PlannedSkip(frozenset({0, 2}))]
    rules.append(SkipParams(policy="ffn_skip", threshold=-1.0, cold_start=1, cold_end=4))
    for row, rule in enumerate([first, second, second]):
        pair.set_neurons(row, rule)
    pair.rows.skip_from[2] = POSITIONS[2] + 1
    pair.rows.policies[3] = RowPolicy.MASK
    pair.rows.mask[3] = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    assert isinstance(rules[4], SkipParams)
    pair.set_skip(4, rules[4])
    gate: RowGate = RowGate(rules)
    if consensus:
        gate = ConsensusGate(rules)
        pair.rows.consensus.copy_(torch.tensor([0.5, 0.01]))
    expected = pair.eager(which[:5], gate)
    close(pair.step(6, "neurons")[:5], expected)
    assert pair.skipped(5) == gate.skipped_layers == [[], [], [], [0, 2], [2, 3]]
    pair.assert_neurons_are(gate)
    assert pair.rows.num_needed.tolist() == [4, 5, 3, 4]
