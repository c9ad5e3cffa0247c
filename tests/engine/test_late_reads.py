"""Tokens read one step late: the same texts, ends and numbers as with every token read at once."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from skipllm_core.engine.engine import MAX_CONSECUTIVE_FAILURES, Engine
from skipllm_core.engine.runner import Batch, StepResult
from skipllm_core.types import SamplingParams, SeqOutput, StepStats
from tests.engine.late import LateFakeRunner
from tests.engine.test_scheduler import (
    SKIPPING,
    Workload,
    assert_ends_as_alone,
    assert_pool_is_whole,
    counted_up,
    play,
    run,
    tokens,
    workloads,
)
from tests.fakes import FakeRunner, fake_engine


def late_engine(runner: LateFakeRunner | None = None, **settings: Any) -> Engine:
    return fake_engine(runner or LateFakeRunner(), **{"max_model_len": 10_000, **settings})


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_read() -> None:
    runner = LateFakeRunner()
    engine = late_engine(runner)
    engine.add(0, [40], SamplingParams(max_tokens=6))
    first = engine.step()  # the prefill: nothing is launched behind it
    assert first is not None
    assert tokens(list(first.outputs)) == [41]
    assert len(runner.batches) == 1
    second = engine.step()
    assert second is not None
    assert tokens(list(second.outputs)) == [42]
    assert len(runner.batches) == 3
    assert runner.num_unread == 1
    assert second.stats.host_s > 0


def test_a_stop_token_found_late_costs_one_row_and_no_token() -> None:
    runner = LateFakeRunner()
    engine = late_engine(runner)
    engine.add(0, [40], SamplingParams(max_tokens=20, stop_token_ids=(44,)))
    engine.add(1, [40], SamplingParams(max_tokens=8))
    outputs, stats = run(engine)
    assert tokens(outputs[0]) == [41, 42, 43, 44]
    assert outputs[0][-1].finish_reason == "stop"
    assert outputs[0][-1].skip_usage is not None
    assert outputs[0][-1].skip_usage.total_ffn_blocks == 3 * 4
    assert tokens(outputs[1]) == counted_up(40, 8)
    decode_rows = [len(b.rows) for b in runner.batches if b.kind == "decode"]
    assert sum(decode_rows) == 3 + 1 + 7, "the row in vain, and nothing else"
    assert sum(step.num_generated_tokens for step in stats) == 12
    assert sum(step.ffn_computed[0] for step in stats if step.kind == "decode") == 10
    assert_pool_is_whole(engine)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_a_known_end_is_never_overrun(max_tokens: int) -> None:
    runner = LateFakeRunner()
    for max_model_len in (512, 4):
        engine = late_engine(runner, max_model_len=max_model_len)
        engine.add(0, [40], SamplingParams(max_tokens=max_tokens))
        outputs, _ = run(engine)
        num_tokens = min(max_tokens, max_model_len - 1)
        assert tokens(outputs[0]) == counted_up(40, num_tokens)
        assert outputs[0][-1].finish_reason == "length"
        assert len(runner.batches) == num_tokens
        runner.batches.clear()


@pytest.mark.parametrize("num_steps", range(12))
def test_an_abort_in_flight_frees_the_blocks_for_the_next(num_steps: int) -> None:
    engine = late_engine(LateFakeRunner(num_kv_blocks=8), max_model_len=1000)
    for seq_id in range(4):
        engine.add(seq_id, [40] * 30, SamplingParams(max_tokens=10))
    for _ in range(num_steps):
        engine.step()
    for seq_id in (0, 1):
        engine.abort(seq_id)
    engine.add(4, [70] * 30, SamplingParams(max_tokens=10))
    outputs, _ = run(engine)
    assert tokens(outputs[4]) == counted_up(70, 10)
    assert not set(outputs) & {0, 1}
    assert not engine.has_work
    assert_pool_is_whole(engine)


def test_preemption_in_flight_keeps_the_token() -> None:
    def serve(num_kv_blocks: int) -> tuple[dict[int, list[SeqOutput]], list[StepStats]]:
        engine = late_engine(LateFakeRunner(num_kv_blocks=num_kv_blocks))
        for seq_id in range(6):
            params = SamplingParams(max_tokens=54, skip=replace(SKIPPING, trace=True))
            engine.add(seq_id, [40 + seq_id] * 10, params)
        return run(engine)

    outputs, stats = serve(num_kv_blocks=8)
    unconstrained, _ = serve(num_kv_blocks=256)
    num_preemptions = sum(step.num_preemptions for step in stats)
    assert num_preemptions > 0
    assert num_preemptions == sum(outputs[seq_id][-1].num_preemptions for seq_id in range(6))
    for seq_id in range(6):
        assert tokens(outputs[seq_id]) == tokens(unconstrained[seq_id])
        assert outputs[seq_id][-1].skip_usage == unconstrained[seq_id][-1].skip_usage


@pytest.mark.parametrize("where", ["fail", "fail_read"])
@pytest.mark.parametrize("bad_step", range(1, 9))
def test_a_failure_in_flight_ends_the_sequences_of_its_step_only(where: str, bad_step: int) -> None:
    num_steps = 0
    failed: set[int] = set()

    def fail(batch: Batch) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == bad_step:
            failed.update(row.seq.seq_id for row in batch.rows)
            raise RuntimeError("out of luck")

    runner = LateFakeRunner(**{where: fail})
    engine = late_engine(runner, max_num_seqs=2)
    for seq_id in range(4):
        engine.add(seq_id, [40 + seq_id], SamplingParams(max_tokens=6))
    outputs, _ = run(engine)
    assert failed
    for seq_id in range(4):
        if seq_id in failed:
            assert outputs[seq_id][-1].finish_reason == "error"
            assert sum(output.finish_reason is not None for output in outputs[seq_id]) == 1
        else:
            assert tokens(outputs[seq_id]) == counted_up(40 + seq_id, 6)
    assert_pool_is_whole(engine)


def test_steps_that_keep_failing_late_cost_the_engine() -> None:
    def fail(batch: Batch) -> None:
        raise RuntimeError("the device is gone")

    engine = late_engine(LateFakeRunner(fail_read=fail))
    for seq_id in range(MAX_CONSECUTIVE_FAILURES - 1):
        engine.add(seq_id, [40], SamplingParams(max_tokens=10))
        assert engine.step() is not None
    engine.add(9, [40], SamplingParams(max_tokens=10))
    with pytest.raises(RuntimeError, match="device"):
        engine.step()


class RowFailingRunner(LateFakeRunner):
    """Finds no finite logits for sequence 1 in its second decode step."""

    def run(self, batch: Batch) -> StepResult:
        result = super().run(batch)
        rows = tuple(
            replace(out, token_id=None, error="logits are not finite")
            if row.seq.seq_id == 1 and row.seq.num_output_tokens == 2
            else out
            for row, out in zip(batch.rows, result.rows, strict=True)
        )
        return replace(result, rows=rows)

    def launch(self, batch: Batch) -> Any:
        # The twin of a row that failed has no token: the device goes on from anything.
        for seq, twin in self._twins.items():
            missing = seq.num_tokens + seq.num_pending_tokens - twin.num_tokens
            twin.token_ids.extend([50] * missing)
        return super().launch(batch)


def test_a_row_that_fails_in_flight_ends_alone() -> None:
    engine = late_engine(RowFailingRunner())
    for seq_id in range(3):
        engine.add(seq_id, [40], SamplingParams(max_tokens=7))
    outputs, _ = run(engine)
    assert tokens(outputs[1]) == [41, 42]
    assert outputs[1][-1].error == "logits are not finite"
    for seq_id in (0, 2):
        assert tokens(outputs[seq_id]) == counted_up(40, 7)
    assert_pool_is_whole(engine)


@settings(deadline=None)
@given(workloads())
def test_every_workload_ends_as_with_tokens_read_at_once(workload: Workload) -> None:
    runner = LateFakeRunner(num_kv_blocks=workload.num_kv_blocks, block_size=4)
    engine = late_engine(
        runner,
        max_num_seqs=workload.max_num_seqs,
        max_num_batched_tokens=workload.budget,
    )
    assert_ends_as_alone(workload.requests, play(engine, workload.requests))
    assert_pool_is_whole(engine)


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic_equals_the_synchronous_engine(seed: int) -> None:
    """Stop tokens, skipping, preemptions and prompts that begin alike, all at once."""

    def serve(runner: FakeRunner) -> tuple[dict[int, list[SeqOutput]], list[StepStats]]:
        rng = random.Random(seed)
        engine = fake_engine(
            runner, max_model_len=120, max_num_seqs=rng.randint(1, 8), max_num_batched_tokens=32
        )
        outputs: dict[int, list[SeqOutput]] = defaultdict(list)
        stats = []
        for seq_id in range(30):
            prompt = [rng.choice([40, 60])] * rng.randint(1, 40)
            params = SamplingParams(
                max_tokens=rng.randint(1, 70),
                min_tokens=rng.choice([0, 5]),
                stop_token_ids=tuple(rng.sample(range(32, 127), 2)),
                skip=replace(SKIPPING, trace=True),
            )
            engine.add(seq_id, prompt, params)
        while (step := engine.step()) is not None:
            stats.append(step.stats)
            for output in step.outputs:
                outputs[output.seq_id].append(replace(output, queue_s=None))
        return outputs, stats

    # A pool that makes them preempt each other; who has to give way depends on the steps' order.
    expected, at_once = serve(FakeRunner(num_kv_blocks=60, block_size=4))
    found, late = serve(runner := LateFakeRunner(num_kv_blocks=60, block_size=4))
    assert runner.max_unread > 1
    for seq_id, outputs in expected.items():
        assert tokens(found[seq_id]) == tokens(outputs)
        assert found[seq_id][-1].finish_reason == outputs[-1].finish_reason
        assert found[seq_id][-1].skip_usage == outputs[-1].skip_usage
        layers = [o.skipped_layers for o in outputs]
        assert [o.skipped_layers for o in found[seq_id]] == layers
    for stats in (at_once, late):
        decodes = [step for step in stats if step.kind == "decode"]
        num_rows = sum(step.ffn_computed[0] + step.ffn_skipped[0] for step in decodes)
        num_generated = sum(step.num_generated_tokens for step in stats)
        assert num_rows == num_generated - len(expected), "one decode step per token but the first"
        assert stats[-1].num_kv_blocks_used == 0
