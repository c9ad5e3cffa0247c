"""The CPU's kernels without some neurons: beside torch's step with masks, and what is not read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skipllm_core.config import Quantization
from skipllm_core.model.attention import ContextRow
from skipllm_core.model.llama import LlamaModel
from skipllm_core.runner.decode import gated_forward
from skipllm_core.runner.neurons import neuron_scores
from skipllm_core.skip.baselines import PlannedSkip
from skipllm_core.skip.neurons import NeuronCounts, NeuronSkip
from skipllm_core.skip.policy import RowGate, SkipRule
from skipllm_core.types import SkipParams
from tests.kernels.rows import EagerRows, Rows, load, needs_the_kernels, prompts_of
from tests.kernels.test_cpu_shapes import SHAPES, assert_near, instructions, save
from tests.model.checkpoints import CHECKPOINTS

__all__ = ["instructions"]  # a fixture

pytestmark = needs_the_kernels

SHARES = ((0.3, 0.3), (0.5, 0.0), (0.0, 0.5), (0.7, 0.4))
LENGTH = 5
TOLERANCE = 1e-4


class CountingGate(RowGate):
    """Keeps all that it is told of neurons."""

    def __init__(self, rules: Sequence[SkipRule | None], *, is_joint: bool = False) -> None:
        super().__init__(rules, leaves_out_together=is_joint)
        self.told: list[NeuronCounts] = []
        count = self.neurons.count

        def keep(layer: int, counts: NeuronCounts) -> None:
            self.told.append(counts)
            count(layer, counts)

        self.neurons.count = keep  # type: ignore[method-assign]


def rule(model: LlamaModel, share_up: float, share_down: float) -> NeuronSkip:
    """Leaves out about these shares: before up, and of the others before down."""
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(64, model.config.hidden_size, generator=generator)
    up, down = [], []
    for block in model.blocks:
        _, first, second = neuron_scores(block, h)
        up.append(float(first.quantile(share_up)) if share_up else 0.0)
        down.append(float(second[first >= up[-1]].quantile(share_down)) if share_down else 0.0)
    return NeuronSkip(tuple(up), tuple(down))


def rules_of(model: LlamaModel, num_rows: int) -> list[SkipRule | None]:
    """Thresholds of all kinds, and a row in full among four."""
    kinds: list[SkipRule | None] = [rule(model, *shares) for shares in SHARES]
    kinds.insert(2, None)
    return [kinds[row % len(kinds)] for row in range(num_rows)]


def everything(model: LlamaModel) -> NeuronSkip:
    huge = (math.inf,) * model.config.num_layers
    return NeuronSkip(huge, huge)


def steps(
    rows: Rows, rules: Sequence[SkipRule | None], *, is_joint: bool = False
) -> tuple[list[Tensor], list[list[NeuronCounts]]]:
    """The logits of every position of the rows, which are as long as each other, and what the gate
    was told."""
    logits, told = [], []
    for position in range(len(rows.prompts[0])):
        gate = CountingGate(rules, is_joint=is_joint)
        logits.append(rows.step(position, list(range(len(rows.prompts))), gate))
        told.append(gate.told)
    return logits, told


def check_beside_torch(
    model: LlamaModel,
    rules: Sequence[SkipRule | None],
    *,
    is_joint: bool = False,
    tolerance: float = TOLERANCE,
) -> list[list[NeuronCounts]]:
    prompts = prompts_of(*[LENGTH] * len(rules))
    found, told = steps(Rows(model, prompts), rules, is_joint=is_joint)
    expected, expected_told = steps(EagerRows(model, prompts), rules, is_joint=is_joint)
    assert told == expected_told
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, tolerance)
    return told


# Beside torch's step -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_counts_are_those_of_torchs_step(name: str, tmp_path: Path) -> None:
    model = load(save(tmp_path, name))
    told = check_beside_torch(model, rules_of(model, 5))
    one = told[0][0]
    assert len(set(one.before_up)) > 2, "the rows leave out different numbers of neurons"
    assert one.before_up[2] == one.before_down[2] == 0, "a row without thresholds"
    assert any(counts.before_down[0] for counts in told[0])


@pytest.mark.parametrize("num_rows", range(1, 10))
def test_any_number_of_rows_leaves_out_neurons(num_rows: int, tmp_path: Path) -> None:
    model = load(save(tmp_path, "llama_biases"))
    told = check_beside_torch(model, rules_of(model, num_rows))
    if num_rows == 1:
        assert all(counts.unread_up == counts.before_up[0] > 0 for counts in told[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_any_size_and_instruction_set_leaves_out_neurons(
    shape: str, instructions: str, tmp_path: Path
) -> None:
    name, changes = SHAPES[shape]
    model = load(save(tmp_path, name, **changes))
    check_beside_torch(model, rules_of(model, 1))
    check_beside_torch(model, rules_of(model, 9))
    check_beside_torch(model, [rule(model, 0.4, 0.3)] * 4, is_joint=True)


def test_a_feed_forward_of_many_segments_leaves_out_neurons(
    instructions: str, tmp_path: Path
) -> None:
    model = load(save(tmp_path, "llama3", hidden_size=672, intermediate_size=2600))
    check_beside_torch(model, rules_of(model, 1))
    check_beside_torch(model, rules_of(model, 5))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weights_leave_out_what_torch_makes_of_them(
    shape: str, instructions: str, tmp_path: Path
) -> None:
    """Of one layer: behind it a rounding may have gone to either of two integers."""
    name, changes = SHAPES[shape]
    model = load(save(tmp_path, name, **changes, num_hidden_layers=1), "int8")
    check_beside_torch(model, rules_of(model, 1), tolerance=1e-2)
    check_beside_torch(model, rules_of(model, 6), tolerance=1e-2)
    check_beside_torch(model, [rule(model, 0.4, 0.3)] * 3, is_joint=True, tolerance=1e-2)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 9])
def test_rows_leave_out_together_what_they_do_in_torchs_step(num_rows: int, tmp_path: Path) -> None:
    model = load(save(tmp_path, "llama3", intermediate_size=300))
    rules: list[SkipRule | None] = [rule(model, *SHARES[row % 4]) for row in range(num_rows)]
    told = check_beside_torch(model, rules, is_joint=True)
    for counts in told[0]:
        assert set(counts.before_up) == {counts.unread_up}
        assert {counts.unread_down - counts.unread_up} == set(counts.before_down)


def test_rows_in_full_beside_those_that_leave_out_together_want_all_neurons(
    tmp_path: Path,
) -> None:
    model = load(save(tmp_path, "qwen3"))
    some = rule(model, 0.5, 0.2)
    told = check_beside_torch(model, [some, None, some, some], is_joint=True)
    assert all(counts.unread_up == counts.unread_down == 0 for counts in told[0])
    assert all(counts.before_up[1] == 0 < counts.before_up[0] for counts in told[0])


def test_rows_of_other_policies_stand_beside_them(tmp_path: Path) -> None:
    model = load(save(tmp_path, "llama3", num_hidden_layers=8))
    blocks = SkipParams(policy="ffn_skip", threshold=0.5, cold_start=1, cold_end=7)
    rules = [rule(model, 0.4, 0.2), blocks, None, PlannedSkip(frozenset({2, 5})), blocks]
    prompts = prompts_of(*[LENGTH] * len(rules))
    by_kernels, by_torch = Rows(model, prompts), EagerRows(model, prompts)
    num_skipped = 0
    for position in range(LENGTH):
        gates = [CountingGate(rules) for _ in range(2)]
        found, expected = (
            rows.step(position, list(range(len(rules))), gate)
            for rows, gate in zip((by_kernels, by_torch), gates, strict=True)
        )
        assert_near(found, expected, TOLERANCE)
        assert gates[0].skipped_layers == gates[1].skipped_layers
        assert gates[0].told == gates[1].told
        num_skipped += len(gates[0].skipped_layers[1])
    assert num_skipped, "the adaptive rule has something to skip"


# Bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_row_is_the_same_bits_whatever_its_batch_mates_leave_out(
    quantization: Quantization, instructions: str, tmp_path: Path
) -> None:
    changes = {"intermediate_size": 333, "hidden_size": 80}
    model = load(save(tmp_path, "llama3", **changes), quantization)
    rules = rules_of(model, 10)
    prompts = prompts_of(*[LENGTH] * len(rules))
    together, told = steps(Rows(model, prompts), rules)
    for row, own in enumerate(rules):
        alone, told_alone = steps(Rows(model, [prompts[row]], num_threads=1), [own])
        for position in range(LENGTH):
            assert torch.equal(together[position][row], alone[position][0])
            for ours, theirs in zip(told[position], told_alone[position], strict=False):
                assert ours.before_up[row] == theirs.before_up[0]
                assert ours.before_down[row] == theirs.before_down[0]


@pytest.mark.parametrize("is_joint", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3, 7])
def test_threads_change_no_bit_and_no_count(
    is_joint: bool, num_threads: int, tmp_path: Path
) -> None:
    model = load(save(tmp_path, "llama3", intermediate_size=1700))
    rules = [rule(model, *shares) for shares in SHARES]
    prompts = prompts_of(*[40] * len(rules))
    found, told = steps(Rows(model, prompts, num_threads=num_threads), rules, is_joint=is_joint)
    again, told_again = steps(Rows(model, prompts, num_threads=2), rules, is_joint=is_joint)
    assert all(map(torch.equal, found, again))
    assert told == told_again


@pytest.mark.parametrize("is_joint", [False, True])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_thresholds_of_zero_give_the_bits_of_a_step_in_full(
    quantization: Quantization, is_joint: bool, tmp_path: Path
) -> None:
    model = load(save(tmp_path, "llama_biases"), quantization)
    nothing = NeuronSkip(*[(0.0,) * model.config.num_layers] * 2)
    prompts = prompts_of(*[LENGTH] * 3)
    found, told = steps(Rows(model, prompts), [nothing] * 3, is_joint=is_joint)
    expected, _ = steps(Rows(model, prompts), [None] * 3)
    assert all(map(torch.equal, found, expected))
    assert all(not any(counts.before_up) and counts.unread_down == 0 for counts in told[0])


@pytest.mark.parametrize("is_joint", [False, True])
def test_huge_thresholds_leave_out_the_whole_feed_forward(is_joint: bool, tmp_path: Path) -> None:
    model = load(save(tmp_path, "llama3"))
    prompts = prompts_of(*[LENGTH] * 2)
    found, told = steps(Rows(model, prompts), [everything(model)] * 2, is_joint=is_joint)
    inner = model.config.intermediate_size
    assert told[0][0] == NeuronCounts([inner] * 2, [0] * 2, inner, inner)
    for block in model.blocks:
        block.ffn.down.weight.zero_()
    expected, _ = steps(Rows(model, prompts), [None] * 2)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("is_joint", [False, True])
def test_what_is_no_number_is_kept_and_seen(is_joint: bool, tmp_path: Path) -> None:
    model = load(save(tmp_path, "llama3"))
    model.embedding[9] = torch.nan
    rows = Rows(model, [[9], [5]])
    gate = CountingGate([everything(model), None], is_joint=is_joint)
    ill, well = rows.step(0, [0, 1], gate)
    assert ill.isnan().all()
    assert gate.told[0].before_up == [0, 0], "no neuron of it is below anything"
    assert not well.isnan().any()


# What is not read --------------------------------------------------------------------------------


def neurons_left_out(
    model: LlamaModel, prompts: list[list[int]], rules: Sequence[NeuronSkip]
) -> list[tuple[Tensor, Tensor]]:
    """By torch, of the first position and per layer: the neurons that no row wants before up, and
    before down."""
    found = []

    def see(layer: int, no_up: Tensor, no_down: Tensor) -> None:
        found.append((no_up.all(dim=0), no_down.all(dim=0)))

    eager = EagerRows(model, prompts)
    with torch.inference_mode():
        context = [ContextRow(0, 1, table) for table in eager.block_tables]
        ctx = model.context(context, eager.kv_cache)
        token_ids = torch.tensor([prompt[0] for prompt in prompts])
        gated_forward(model, token_ids, ctx, RowGate(rules), see)
    return found


@pytest.mark.parametrize("num_rows", [1, 3])
def test_weights_that_no_row_wants_are_not_read(num_rows: int, tmp_path: Path) -> None:
    model = load(save(tmp_path, "llama3", intermediate_size=300))
    prompts = prompts_of(*[1] * num_rows)
    rules = [rule(model, 0.6, 0.4)] * num_rows
    expected = Rows(model, prompts).step(0, list(range(num_rows)), CountingGate(rules))
    inner, num_poisoned = model.config.intermediate_size, 0
    for block, (no_up, no_down) in zip(
        model.blocks, neurons_left_out(model, prompts, rules), strict=True
    ):
        block.ffn.gate_up.weight[inner:][no_up] = torch.nan
        block.ffn.down.weight[:, no_down] = torch.nan
        num_poisoned += int(no_up.sum())
        assert int(no_down.sum()) > int(no_up.sum())
    assert num_poisoned
    found = Rows(model, prompts).step(0, list(range(num_rows)), CountingGate(rules))
    assert torch.equal(found, expected)


def test_weights_that_only_others_want_do_not_touch_a_row(tmp_path: Path) -> None:
    """What a row leaves out is not multiplied by 0 for it: that would be no number."""
    model = load(save(tmp_path, "llama3", num_hidden_layers=1))
    prompts = prompts_of(1, 1)
    own = rule(model, 0.5, 0.3)
    expected = Rows(model, prompts[:1]).step(0, [0], CountingGate([own]))
    ((_, no_down),) = neurons_left_out(model, prompts[:1], [own])
    model.blocks[0].ffn.down.weight[:, no_down] = torch.nan
    found = Rows(model, prompts).step(0, [0, 1], CountingGate([own, None]))
    assert torch.equal(found[0], expected[0])
    assert found[1].isnan().all()


# Bad arguments do not crash ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "thresholds", [[], [(0.0, 0.0)], [(0.0, 0.0)] * 3, [(0.0,), (0.0,)], [0.0, 0.0], [("x", 0)] * 2]
)
def test_thresholds_that_are_not_a_pair_for_each_row_are_refused(
    thresholds: Any, tmp_path: Path
) -> None:
    rows = Rows(load(save(tmp_path, "llama3")), [[1], [2]])
    rows.decoder.begin([1, 2], [0, 0], rows.block_tables)
    with pytest.raises(TypeError):
        rows.decoder.feed_forward_neurons(0, None, thresholds, is_joint=False, is_watched=False)
