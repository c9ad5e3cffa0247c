"""The skip rule, on a model whose similarities are written down by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from skipllm_core.runner.decode import decode_step
from skipllm_core.sequence import Sequence as Seq
from skipllm_core.skip.policy import (
    ForcedGate,
    NeverGate,
    RowGate,
    SkipGate,
    gate_for,
    similarity,
    skip_at,
    weight_reads_avoided,
)
from skipllm_core.types import SamplingParams, SkipParams

#         layer 0     1     2     3     4     5     6     7
COSINES = (0.10, 0.90, 0.95, 0.97, 0.92, 0.99, 0.98, 0.20)
NUM_LAYERS = len(COSINES)


class StubBlock:
    """Attention that adds nothing, and an FFN that turns h by an angle of the given cosine.

    A row is a point in the plane; row r of the model turns by its own cosine, so that rows can
    differ: the row is known by a third coordinate, which the FFN leaves alone.
    """

    def __init__(self, cosines: Sequence[float]) -> None:
        self.cosines = torch.tensor(cosines)  # [num_rows]
        self.rows_computed: list[list[int]] = []
        self.num_attended = 0

    def attend(self, h: Tensor, ctx: object) -> Tensor:
        self.num_attended += 1
        return h

    def feed_forward(self, h: Tensor) -> Tensor:
        rows = [int(row) for row in (h[:, 2] * 1e6).round()]
        self.rows_computed.append(rows)
        angles = self.cosines[rows].arccos()
        turned = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1)
        plane = (turned.view(-1, 2, 2) @ h[:, :2, None])[..., 0]
        return torch.cat([plane, h[:, 2:]], dim=-1)


class StubModel:
    def __init__(self, *cosines_of_rows: Sequence[float]) -> None:
        self.blocks = [StubBlock(layer) for layer in zip(*cosines_of_rows, strict=True)]

    def embed(self, token_ids: Tensor) -> Tensor:
        rows = torch.arange(len(token_ids)) * 1e-6  # too small to be felt in a cosine
        return torch.stack([torch.ones(len(rows)), torch.zeros(len(rows)), rows], -1)

    def head(self, h: Tensor) -> Tensor:
        return h

    def layers_run(self, row: int = 0) -> list[int]:
        return [n for n, block in enumerate(self.blocks) if [row] in block.rows_computed]


def skip(**changes: object) -> SkipParams:
    settings = {"threshold": 0.96, "warmup_tokens": 0, "cold_start": 1, "cold_end": 7}
    return SkipParams(policy="ffn_skip", **settings | changes)


def run(model: StubModel, gate: SkipGate) -> Tensor:
    num_rows = len(model.blocks[0].cosines)
    return decode_step(model, torch.zeros(num_rows, dtype=torch.int64), None, gate)


def skipped_with(**changes: object) -> list[int]:
    gate = RowGate([skip(**changes)])
    run(StubModel(COSINES), gate)
    return gate.skipped_layers[0]


# The rule ----------------------------------------------------------------------------------------


def test_a_trigger_skips_from_the_next_layer_on_up_to_the_cold_end() -> None:
    # Worked by hand: 0.90 and 0.95 are below 0.96, layer 3 (0.97) is the first that is not. So 4, 5
    # and 6 are skipped, 6 being the last before the cold end, and layer 7 runs again.
    model, gate = StubModel(COSINES), RowGate([skip()])
    run(model, gate)
    assert gate.skipped_layers == [[4, 5, 6]]
    assert model.layers_run() == [0, 1, 2, 3, 7]


def test_the_ffn_that_triggers_is_used_and_skipped_ones_change_nothing() -> None:
    h = run(StubModel(COSINES), RowGate([skip()]))
    angle = sum(torch.tensor(COSINES[layer]).arccos() for layer in (0, 1, 2, 3, 7))
    torch.testing.assert_close(h[0, :2], torch.stack([angle.cos(), angle.sin()]))


def test_a_similarity_equal_to_the_threshold_triggers() -> None:
    exactly = float(similarity(*residuals_of_layer_3()))
    assert skipped_with(threshold=exactly) == [4, 5, 6]
    assert skipped_with(threshold=exactly + 1e-7)[:1] != [4]


def residuals_of_layer_3() -> tuple[Tensor, Tensor]:
    model = StubModel(COSINES)
    h = model.embed(torch.zeros(1))
    for block in model.blocks[:3]:
        h = block.feed_forward(h)
    return h, model.blocks[3].feed_forward(h)


def test_attention_runs_in_every_layer() -> None:
    model = StubModel(COSINES)
    run(model, RowGate([skip(threshold=-1.0)]))
    assert all(block.num_attended == 1 for block in model.blocks)


def test_every_token_triggers_anew() -> None:
    model, params = StubModel(COSINES), skip()
    for _ in range(2):
        gate = gate_for([params])
        run(model, gate)
        assert gate.skipped_layers == [[4, 5, 6]]


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 0.93])
def test_cold_layers_run_however_low_the_threshold(threshold: float) -> None:
    layers = skipped_with(threshold=threshold, cold_start=2, cold_end=6)
    assert layers == [3, 4, 5]  # layer 2 is the first that can trigger


def test_layers_before_the_cold_start_do_not_trigger() -> None:
    assert skipped_with(threshold=0.85, cold_start=3) == [4, 5, 6]


def test_nothing_is_skipped_where_no_layer_reaches_the_threshold() -> None:
    assert skipped_with(threshold=0.995) == []


def test_a_trigger_at_the_last_skippable_layer_has_nothing_to_skip() -> None:
    assert skipped_with(threshold=0.985, cold_end=6) == []


def test_max_skips_bounds_the_skips_of_a_token() -> None:
    assert skipped_with(max_skips=2) == [4, 5]
    assert skipped_with(max_skips=3) == [4, 5, 6]


# Rows --------------------------------------------------------------------------------------------

EARLY = (0.10, 0.97, *COSINES[2:])  # triggers at layer 1
LATE = (0.10, 0.90, 0.95, 0.90, 0.92, 0.99, 0.98, 0.20)  # at layer 5


def test_each_row_of_a_batch_skips_as_it_would_alone() -> None:
    settings = [skip(), None, skip(max_skips=1), skip(cold_end=5), skip(threshold=0.99)]
    rows = [EARLY, EARLY, COSINES, LATE, EARLY]
    batch = RowGate(settings)
    together = run(StubModel(*rows), batch)
    for n, (params, cosines) in enumerate(zip(settings, rows, strict=True)):
        gate = RowGate([params])
        alone = run(StubModel(cosines), gate)
        assert batch.skipped_layers[n] == gate.skipped_layers[0]
        torch.testing.assert_close(together[n, :2], alone[0, :2])


def test_a_layer_is_computed_only_for_the_rows_that_run_it() -> None:
    model = StubModel(EARLY, LATE)
    gate = RowGate([skip(), skip()])
    run(model, gate)
    assert gate.skipped_layers == [[2, 3, 4, 5, 6], [6]]
    computed = [block.rows_computed for block in model.blocks]
    assert computed == [[[0, 1]], [[0, 1]], [[1]], [[1]], [[1]], [[1]], [], [[0, 1]]]


def test_weights_are_saved_only_where_every_row_skips() -> None:
    gate = RowGate([skip(), skip()])
    run(StubModel(EARLY, LATE), gate)
    assert weight_reads_avoided(gate, 8) == 1
    assert weight_reads_avoided(NeverGate(2), 8) == 0


def test_a_row_that_skips_keeps_its_residual_bit_for_bit() -> None:
    h = torch.randn(5, 3) * 1e-6
    h[:, 2] = torch.arange(5) * 1e-6
    model = StubModel(*[COSINES] * 5)
    model.embed = lambda token_ids: h.clone()
    mask = [[row != 2] * NUM_LAYERS for row in range(5)]
    after = run(model, ForcedGate(mask))
    others = [0, 1, 3, 4]
    assert torch.equal(after[others], h[others])
    assert not torch.equal(after[2], h[2])


def test_forced_gate_skips_exactly_its_mask() -> None:
    mask = torch.rand(4, NUM_LAYERS, generator=torch.Generator().manual_seed(1)) < 0.5
    model, gate = StubModel(*[COSINES] * 4), ForcedGate(mask.tolist())
    run(model, gate)
    for row in range(4):
        assert gate.skipped_layers[row] == mask[row].nonzero()[:, 0].tolist()
    for layer, block in enumerate(model.blocks):
        expected = (~mask[:, layer]).nonzero()[:, 0].tolist()
        assert block.rows_computed == ([expected] if expected else [])


def test_forcing_the_decisions_of_the_rule_gives_the_same_result() -> None:
    adaptive = RowGate([skip(), skip(), None])
    rows = [EARLY, LATE, COSINES]
    expected = run(StubModel(*rows), adaptive)
    mask = [[n in layers for n in range(NUM_LAYERS)] for layers in adaptive.skipped_layers]
    forced = ForcedGate(mask)
    assert torch.equal(run(StubModel(*rows), forced), expected)
    assert forced.skipped_layers == adaptive.skipped_layers


def test_similarities_stop_being_looked_at_once_every_row_triggered(monkeypatch) -> None:
    looked_at = []
    monkeypatch.setattr(
        "skipllm_core.runner.decode.similarity",
        lambda before, after: looked_at.append(1) or similarity(before, after),
    )
    run(StubModel(EARLY, COSINES), RowGate([skip(), skip()]))
    assert len(looked_at) == 3  # layers 1, 2 and 3


def test_not_a_number_never_triggers() -> None:
    gate = RowGate([skip(threshold=-1.0)])
    gate.observe(2, [float("nan")])
    assert gate.rows_to_run(3) == range(1)


def test_similarity_is_taken_in_float32() -> None:
    before = torch.full((1, 4096), 300.0, dtype=torch.float16)  # its square overflows float16
    assert float(similarity(before, before)) == pytest.approx(1.0)


# When a row may skip at all ----------------------------------------------------------------------


def decoding(num_output: int, params: SkipParams) -> Seq:
    seq = Seq(0, [1, 2, 3], SamplingParams(max_tokens=99, skip=params))
    seq.token_ids += [4] * num_output
    return seq


def next_skip(num_output: int, params: SkipParams) -> SkipParams | None:
    seq = decoding(num_output, params)
    return skip_at(seq, seq.num_tokens - 1)


def test_warm_up_tokens_are_decoded_in_full() -> None:
    params = skip(warmup_tokens=3)
    assert [next_skip(n, params) for n in range(1, 5)] == [None, None, params, params]


def test_warm_up_ends_where_the_sequence_says_it_ends() -> None:
    params = skip(warmup_tokens=3)
    for n in range(1, 6):
        assert (next_skip(n, params) is None) == decoding(n, params).is_warming_up


def test_prompt_tokens_are_never_skipped() -> None:
    seq = decoding(2, skip(warmup_tokens=0))
    assert [skip_at(seq, position) is None for position in range(5)] == [True] * 3 + [False] * 2


def test_under_the_wish_a_prompts_tokens_are_decoded_ones_behind_its_first() -> None:
    params = skip(warmup_tokens=3, prompt=True)
    seq = Seq(0, [1, 2, 3, 4, 5], SamplingParams(max_tokens=99, skip=params))
    assert [skip_at(seq, position) for position in range(6)] == [None] * 3 + [params] * 3
    assert not seq.is_warming_up


@pytest.mark.parametrize(
    "params", [SkipParams(), skip(max_skips=0), skip(cold_start=3, cold_end=4), skip(cold_end=0)]
)
def test_a_row_that_cannot_skip_takes_the_free_gate(params: SkipParams) -> None:
    row = next_skip(9, params)
    assert row is None
    assert isinstance(gate_for([row, None]), NeverGate)
