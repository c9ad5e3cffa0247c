"""How sequences end, what a failure costs, and what the numbers count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from skipllm_core.engine.engine import MAX_CONSECUTIVE_FAILURES
from skipllm_core.engine.runner import Batch, StepResult
from skipllm_core.errors import ConfigError
from skipllm_core.types import SamplingParams, SkipParams
from tests.engine.test_scheduler import assert_pool_is_whole, counted_up, run, tokens
from tests.fakes import FakeRunner, fake_engine


def test_a_stop_token_ends_the_sequence_and_is_told_apart() -> None:
    engine = fake_engine()
    engine.add(0, [40], SamplingParams(max_tokens=10, stop_token_ids=(44, 45)))
    (outputs,) = run(engine)[0].values()
    assert tokens(outputs) == [41, 42, 43, 44]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id == 44


def test_no_stop_token_ends_it_before_min_tokens_others() -> None:
    engine = fake_engine(FakeRunner(lambda seq: 44))
    engine.add(0, [40], SamplingParams(max_tokens=10, min_tokens=4, stop_token_ids=(44,)))
    (outputs,) = run(engine)[0].values()
    assert tokens(outputs) == [44] * 5
    assert outputs[-1].finish_reason == "stop"


def test_the_context_ends_it_when_it_is_full() -> None:
    engine = fake_engine(max_model_len=16)
    engine.add(0, [40] * 12, SamplingParams(max_tokens=100))
    (outputs,) = run(engine)[0].values()
    assert tokens(outputs) == counted_up(40, 4)
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("num_steps", range(9))
def test_an_abort_at_any_point_frees_the_blocks(num_steps: int) -> None:
    engine = fake_engine(
        FakeRunner(num_kv_blocks=8), max_num_seqs=2, max_num_batched_tokens=16, max_model_len=1000
    )
    for seq_id in range(4):  # two prefill in chunks and then decode, two wait
        engine.add(seq_id, [40] * 30, SamplingParams(max_tokens=10))
    for _ in range(num_steps):
        engine.step()
    for seq_id in range(4):
        engine.abort(seq_id)
        engine.abort(seq_id)
    assert not engine.has_work
    assert engine.step() is None
    assert_pool_is_whole(engine)


def test_a_step_that_raises_costs_its_own_sequences_only() -> None:
    def fail(batch: Batch) -> None:
        if any(row.seq.seq_id == 1 for row in batch.rows):
            raise RuntimeError("out of luck")

    engine = fake_engine(FakeRunner(num_kv_blocks=8, fail=fail), max_model_len=1000)
    engine.add(0, [40], SamplingParams(max_tokens=10))
    first = engine.step()
    engine.add(1, [40], SamplingParams(max_tokens=10))
    outputs, stats = run(engine)
    assert first is not None
    assert tokens([*first.outputs, *outputs[0]]) == counted_up(40, 10)
    (failed,) = outputs[1]
    assert failed.finish_reason == "error"
    assert failed.error
    assert "luck" not in failed.error
    assert stats[0].num_prompt_tokens == 0
    assert_pool_is_whole(engine)


def test_steps_that_keep_raising_cost_the_engine() -> None:
    def fail(batch: Batch) -> None:
        raise RuntimeError("the device is gone")

    engine = fake_engine(FakeRunner(fail=fail))
    for _ in range(MAX_CONSECUTIVE_FAILURES - 1):
        engine.add(0, [40], SamplingParams(max_tokens=10))
        step = engine.step()
        assert step is not None
        assert step.outputs[0].finish_reason == "error"
    engine.add(0, [40], SamplingParams(max_tokens=10))
    with pytest.raises(RuntimeError, match="device"):
        engine.step()


class RowFailingRunner(FakeRunner):
    """Finds no finite logits for sequence 1 in decode steps."""

    def run(self, batch: Batch) -> StepResult:
        result = super().run(batch)
        rows = tuple(
            replace(out, token_id=None, error="logits are not finite")
            if batch.kind == "decode" and row.seq.seq_id == 1
            else out
            for row, out in zip(batch.rows, result.rows, strict=True)
        )
        return replace(result, rows=rows)


def test_a_row_that_fails_ends_alone() -> None:
    engine = fake_engine(RowFailingRunner())
    for seq_id in range(3):
        engine.add(seq_id, [40], SamplingParams(max_tokens=5))
    outputs, _ = run(engine)
    assert tokens(outputs[1]) == [41]
    assert outputs[1][-1].finish_reason == "error"
    assert outputs[1][-1].error == "logits are not finite"
    for seq_id in (0, 2):
        assert tokens(outputs[seq_id]) == counted_up(40, 5)
        assert outputs[seq_id][-1].finish_reason == "length"


def test_steps_and_sequences_count_the_same_ffn_blocks() -> None:
    skip = SkipParams(policy="ffn_skip", warmup_tokens=3, cold_start=1, cold_end=3, trace=True)
    engine = fake_engine(FakeRunner(num_layers=4, num_skipped=2))
    engine.add(0, [40], SamplingParams(max_tokens=8, skip=skip))
    engine.add(1, [40], SamplingParams(max_tokens=5))
    outputs, stats = run(engine)
    usages = [outputs[seq_id][-1].skip_usage for seq_id in (0, 1)]
    assert usages[0] is not None
    assert usages[1] is not None
    assert usages[0].total_ffn_blocks == 7 * 4
    assert usages[0].skipped_ffn_blocks == 5 * 2  # 3 tokens of 8 are warm-up
    assert usages[0].warmup_tokens == 3
    assert usages[1].skipped_ffn_blocks == usages[1].warmup_tokens == 0
    traced = [layers for output in outputs[0] for layers in output.skipped_layers]
    assert traced == [()] * 3 + [(1, 2)] * 5
    assert all(output.skipped_layers == () for output in outputs[1])

    decodes = [step for step in stats if step.kind == "decode"]
    skipped = [sum(step.ffn_skipped[layer] for step in decodes) for layer in range(4)]
    computed = [sum(step.ffn_computed[layer] for step in decodes) for layer in range(4)]
    assert skipped == [0, 5, 5, 0]
    assert computed == [11, 6, 6, 11]
    assert sum(step.num_generated_tokens for step in stats) == 13
    assert sum(step.num_prompt_tokens for step in stats) == 2
    assert stats[0].ffn_computed == ()
    assert sum(step.ffn_weight_reads + step.ffn_weight_reads_avoided for step in decodes) == 7 * 4
    assert stats[-1].num_running == stats[-1].num_kv_blocks_used == 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: fake_engine(max_num_seqs=33, max_num_batched_tokens=32),
        lambda: fake_engine(max_num_seqs=0),
    ],
)
def test_settings_that_contradict_each_other_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        build()
