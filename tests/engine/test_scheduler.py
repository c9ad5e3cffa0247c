"""Whatever comes, in whatever order, on however small a pool: everything ends, and ends right."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from skipllm_core.engine.engine import Engine
from skipllm_core.engine.runner import Batch
from skipllm_core.types import SamplingParams, SeqOutput, SkipParams, StepStats
from tests.fakes import FakeRunner, fake_engine, prompt_logprob

SKIPPING = SkipParams(policy="ffn_skip", warmup_tokens=2, cold_start=1, cold_end=3)


def run(engine: Engine) -> tuple[dict[int, list[SeqOutput]], list[StepStats]]:
    """Steps until nothing is left; every sequence's outputs, and every step's statistics."""
    outputs: dict[int, list[SeqOutput]] = defaultdict(list)
    stats = []
    while (step := engine.step()) is not None:
        stats.append(step.stats)
        for output in step.outputs:
            outputs[output.seq_id].append(output)
    return outputs, stats


def tokens(outputs: list[SeqOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def counted_up(last: int, num_tokens: int) -> list[int]:
    """What the fake model says after a prompt that ends in `last`."""
    return [32 + (last - 32 + step) % 95 for step in range(1, num_tokens + 1)]


def assert_pool_is_whole(engine: Engine) -> None:
    """A sequence as large as the pool runs without preemption, so no block is held or lost."""
    info = engine.info
    size = info.num_kv_blocks * info.block_size
    engine.add(10**9, [40] * (size - 1), SamplingParams(max_tokens=2))
    outputs, stats = run(engine)
    assert tokens(outputs[10**9]) == [41, 42]
    assert sum(step.num_preemptions for step in stats) == 0
    assert stats[-1].num_kv_blocks_used == 0


@dataclass(frozen=True)
class Request:
    num_prompt_tokens: int
    max_tokens: int
    arrives_at: int  # step
    aborted_at: int | None
    first: int  # requests with these two alike have the same prompt, as far as the shorter goes;
    period: int  # with 4, all of its blocks are alike
    skip: SkipParams
    prompt_logprobs: int | None = None

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens, skip=self.skip, prompt_logprobs=self.prompt_logprobs
        )

    @property
    def prompt_ids(self) -> list[int]:
        num_repeats = -(-self.num_prompt_tokens // self.period)
        return (counted_up(self.first, self.period) * num_repeats)[: self.num_prompt_tokens]

    @property
    def text(self) -> list[int]:
        return counted_up(self.prompt_ids[-1], self.max_tokens)


@dataclass(frozen=True)
class Workload:
    num_kv_blocks: int  # of 4 tokens
    max_num_seqs: int
    budget: int
    requests: list[Request]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    num_kv_blocks = draw(st.integers(2, 12))
    max_num_seqs = draw(st.integers(1, 6))

    @st.composite
    def fitting_requests(draw: st.DrawFn) -> Request:
        num_prompt_tokens = draw(st.integers(1, 4 * num_kv_blocks))
        max_tokens = draw(st.integers(0, 4 * num_kv_blocks + 1 - num_prompt_tokens))
        aborted_at = draw(st.none() | st.integers(0, 60))
        return Request(
            num_prompt_tokens,
            max_tokens,
            draw(st.integers(0, 30)),
            aborted_at,
            first=draw(st.integers(31, 33)),
            period=draw(st.sampled_from([4, 95])),
            skip=draw(st.sampled_from([SkipParams(), SKIPPING, replace(SKIPPING, prompt=True)])),
            prompt_logprobs=draw(st.sampled_from([None, 0, 2])),
        )

    return Workload(
        num_kv_blocks,
        max_num_seqs,
        budget=draw(st.integers(max_num_seqs, 40)),
        requests=draw(st.lists(fitting_requests(), min_size=1, max_size=10)),
    )


def play(engine: Engine, requests: list[Request]) -> dict[int, list[SeqOutput]]:
    """Adds and aborts each request at its step; its index is its seq_id."""
    outputs: dict[int, list[SeqOutput]] = defaultdict(list)
    for now in itertools.count():
        for seq_id, request in enumerate(requests):
            if request.arrives_at == now:
                engine.add(seq_id, request.prompt_ids, request.params)
            if request.aborted_at == now:
                engine.abort(seq_id)
        step = engine.step()
        for output in step.outputs if step else ():
            outputs[output.seq_id].append(output)
        if now > 60 and step is None:
            return outputs
    raise AssertionError


def assert_ends_as_alone(requests: list[Request], outputs: dict[int, list[SeqOutput]]) -> None:
    """Everyone who was not aborted has its text, and was told of its prompt exactly once."""
    order = sorted(outputs, key=lambda seq_id: requests[seq_id].arrives_at)
    assert list(outputs) == order, "not first come, first served"
    for seq_id, request in enumerate(requests):
        text = tokens(outputs[seq_id])
        assert text == request.text[: len(text)]
        told = [found for output in outputs[seq_id] for found in output.prompt_logprobs]
        scores = []
        if (num_top := request.prompt_logprobs) is not None:
            following = list(enumerate(request.prompt_ids))[1:]
            scores = [prompt_logprob(*place, num_top) for place in following]
        assert told == scores[: len(told)]
        if request.aborted_at is not None and request.aborted_at >= request.arrives_at:
            continue
        last = outputs[seq_id][-1]
        assert len(text) == request.max_tokens
        assert len(told) == len(scores)
        assert last.finish_reason == "length"
        assert last.skip_usage is not None
        num_counted = max(0, request.max_tokens - 1)
        num_counted += (request.num_prompt_tokens - 1) * request.skip.prompt
        assert last.skip_usage.total_ffn_blocks == num_counted * 4
        assert sum(output.queue_s is not None for output in outputs[seq_id]) == 1


@settings(deadline=None)
@given(workloads())
def test_every_sequence_ends_with_the_text_it_has_alone(workload: Workload) -> None:
    def look(batch: Batch) -> None:
        rows = batch.rows
        assert len(rows) <= workload.max_num_seqs
        assert sum(row.num_tokens for row in rows) <= workload.budget
        assert all(row.num_tokens > 0 for row in rows)
        assert all(row.seq.is_prefilled == (batch.kind == "decode") for row in rows), "mixed"

    engine = fake_engine(
        FakeRunner(num_kv_blocks=workload.num_kv_blocks, block_size=4, fail=look),
        max_num_seqs=workload.max_num_seqs,
        max_num_batched_tokens=workload.budget,
    )
    assert_ends_as_alone(workload.requests, play(engine, workload.requests))
    assert_pool_is_whole(engine)


def test_a_small_pool_preempts_and_everyone_finishes_with_the_same_text() -> None:
    def serve(num_kv_blocks: int) -> tuple[dict[int, list[SeqOutput]], list[StepStats]]:
        engine = fake_engine(FakeRunner(num_kv_blocks=num_kv_blocks))
        for seq_id in range(6):
            prompt = [40 + seq_id] * 10
            engine.add(seq_id, prompt, SamplingParams(max_tokens=54))  # 63 tokens: 4 blocks
        return run(engine)

    outputs, stats = serve(num_kv_blocks=8)
    unconstrained, _ = serve(num_kv_blocks=256)
    num_preemptions = sum(step.num_preemptions for step in stats)
    assert num_preemptions > 0
    assert num_preemptions == sum(outputs[seq_id][-1].num_preemptions for seq_id in range(6))
    for seq_id in range(6):
        assert tokens(outputs[seq_id]) == tokens(unconstrained[seq_id])
        assert outputs[seq_id][-1].finish_reason == "length"
    # Recomputed tokens are not decode steps: those are one per token after the first.
    usage = outputs[5][-1].skip_usage
    assert usage is not None
    assert usage.total_ffn_blocks == 53 * 4


def test_the_latest_arrived_gives_way_to_the_oldest() -> None:
    engine = fake_engine(FakeRunner(num_kv_blocks=4))
    for seq_id in range(2):
        engine.add(seq_id, [40] * 16, SamplingParams(max_tokens=40))
    outputs, _ = run(engine)
    assert outputs[0][-1].num_preemptions == 0
    assert outputs[1][-1].num_preemptions == 1


def test_several_prompts_share_a_prefill_step_and_a_long_one_is_cut() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner, max_num_batched_tokens=64)
    for seq_id, num_prompt in enumerate([20, 20, 60]):
        engine.add(seq_id, [40] * num_prompt, SamplingParams(max_tokens=2))
    run(engine)
    first, second, third = runner.batches[:3]
    assert [row.num_tokens for row in first.rows] == [20, 20, 24]
    assert second.kind == "decode"
    assert [row.seq.seq_id for row in second.rows] == [0, 1]
    assert third.kind == "prefill"
    assert [row.num_tokens for row in third.rows] == [36]


def test_running_streams_wait_for_one_chunk_at_most() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner, max_num_batched_tokens=512, max_model_len=4096)
    for seq_id in range(8):
        engine.add(seq_id, [40 + seq_id], SamplingParams(max_tokens=50))
    engine.step()
    engine.add(8, [40] * 2000, SamplingParams(max_tokens=2))
    run(engine)
    first, *steps = runner.batches[:34]
    assert first.kind == "prefill"
    assert [batch.kind for batch in steps] == [*["decode", "prefill"] * 16, "decode"]
    assert [len(batch.rows) for batch in steps[::2]] == [*[8] * 16, 9]
    assert [batch.rows[0].num_tokens for batch in steps[1::2]] == [*[128] * 15, 80]


@pytest.mark.parametrize(
    ("num_streams", "num_prompt_tokens", "chunk"),
    [
        (2, 128, 12),  # an eleventh
        (2, 30, 4),  # the least that pays
        (14, 128, 14),  # what a step of the streams costs
        (2, 4000, 128),  # a quarter of the budget
    ],
)
def test_a_short_prompt_delays_running_streams_less_than_a_long_one(
    num_streams: int, num_prompt_tokens: int, chunk: int
) -> None:
    runner = FakeRunner(num_kv_blocks=512, min_prefill_tokens=4)
    engine = fake_engine(runner, max_num_batched_tokens=512, max_model_len=4096, max_num_seqs=16)
    for seq_id in range(num_streams):
        engine.add(seq_id, [40 + seq_id], SamplingParams(max_tokens=99))
    engine.step()
    engine.add(99, [40] * num_prompt_tokens, SamplingParams(max_tokens=2))
    run(engine)
    chunks = [batch.rows[0].num_tokens for batch in runner.batches[1:] if batch.kind == "prefill"]
    assert set(chunks[:-1]) == {chunk}
    assert sum(chunks) == num_prompt_tokens


def test_prompts_that_outnumber_the_streams_are_not_spread() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner, max_num_batched_tokens=512, max_model_len=4096, max_num_seqs=6)
    for seq_id in range(2):
        engine.add(seq_id, [40 + seq_id], SamplingParams(max_tokens=9))
    engine.step()
    for seq_id in range(2, 6):
        engine.add(seq_id, [40] * 64, SamplingParams(max_tokens=99))
    run(engine)
    chunks = [
        [row.num_tokens for row in batch.rows]
        for batch in runner.batches[1:]
        if batch.kind == "prefill"
    ]
    assert chunks[0] == [64, 64], "four prompts beside two streams: a quarter of the budget"
    assert set(map(sum, chunks[1:-1])) == {8}, "two beside four, and so on: spread"


def test_a_prompt_that_nobody_waits_for_takes_whole_steps() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner, max_num_batched_tokens=512, max_model_len=4096)
    engine.add(0, [40] * 1100, SamplingParams(max_tokens=1))
    run(engine)
    assert [batch.rows[0].num_tokens for batch in runner.batches] == [512, 512, 76]


def test_a_steady_stream_of_newcomers_stops_no_stream() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner, max_num_batched_tokens=32)
    engine.add(0, [40], SamplingParams(max_tokens=50))
    for seq_id in range(1, 100):  # there is always another prompt to begin with
        engine.add(seq_id, [40] * 32, SamplingParams(max_tokens=1))
        engine.step()
    decodes = [batch for batch in runner.batches if batch.kind == "decode"]
    assert len(decodes) == 49, "all of its tokens but the first, in every other step"


def test_a_short_prompt_waits_for_the_long_one_before_it_and_no_longer() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner, max_num_batched_tokens=32)
    engine.add(0, [40] * 80, SamplingParams(max_tokens=5))
    engine.add(1, [41] * 10, SamplingParams(max_tokens=5))
    engine.add(2, [42] * 10, SamplingParams(max_tokens=5))
    run(engine)
    rows = [[(row.seq.seq_id, row.num_tokens) for row in batch.rows] for batch in runner.batches]
    assert rows[:3] == [[(0, 32)], [(0, 32)], [(0, 16), (1, 10), (2, 6)]]


def test_no_more_than_max_num_seqs_run_and_the_rest_wait_their_turn() -> None:
    engine = fake_engine(max_num_seqs=2)
    for seq_id in range(5):
        engine.add(seq_id, [40], SamplingParams(max_tokens=3))
    outputs, stats = run(engine)
    assert max(step.num_running for step in stats) == 2
    assert stats[0].num_waiting == 3
    assert len(outputs) == 5
    waits = [outputs[seq_id][0].queue_s for seq_id in range(5)]
    assert all(wait is not None for wait in waits)
    assert all(output.queue_s is None for outs in outputs.values() for output in outs[1:])
