"""Prompts that begin alike share blocks: which, when, for how long, and nothing else."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from skipllm_core.engine.block_manager import BlockManager
from skipllm_core.engine.engine import Engine
from skipllm_core.engine.runner import Batch, StepResult
from skipllm_core.sequence import Sequence
from skipllm_core.types import SamplingParams, SkipParams, StepStats
from tests.engine.test_scheduler import SKIPPING, assert_pool_is_whole, counted_up, run, tokens
from tests.fakes import FakeRunner, fake_engine


def ask(
    engine: Engine, prompt_ids: list[int], max_tokens: int = 5, skip: SkipParams | None = None
) -> tuple[int, StepStats]:
    """One request alone: its cached tokens, and the statistics of the step that admitted it."""
    params = SamplingParams(max_tokens=max_tokens, skip=skip or SkipParams())
    engine.add(0, prompt_ids, params)
    outputs, stats = run(engine)
    assert tokens(outputs[0]) == counted_up(prompt_ids[-1], max_tokens)
    cached = outputs[0][0].num_cached_tokens
    assert cached is not None
    assert all(output.num_cached_tokens is None for output in outputs[0][1:])
    return cached, stats[0]


def prompt(num_tokens: int, first: int = 40) -> list[int]:
    """No two tokens of it are alike within 95, and another `first` changes all of them."""
    return counted_up(first, num_tokens)


def manager(num_blocks: int = 8, block_size: int = 4) -> BlockManager:
    return BlockManager(num_blocks, block_size)


def computed(
    blocks: BlockManager, prompt_ids: list[int], num_tokens: int | None = None
) -> Sequence:
    """A sequence whose prompt was computed, or `num_tokens` of it."""
    seq = Sequence(0, prompt_ids, SamplingParams(max_tokens=1))
    blocks.share(seq, blocks.find_prefix(seq))
    blocks.grow(seq, len(prompt_ids))
    seq.num_computed_tokens = len(prompt_ids) if num_tokens is None else num_tokens
    blocks.publish(seq)
    return seq


def num_found(blocks: BlockManager, prompt_ids: list[int]) -> int:
    return len(blocks.find_prefix(Sequence(1, prompt_ids, SamplingParams(max_tokens=1))))


# What is shared ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "num_cached"), [(15, 0), (16, 0), (17, 16), (40, 32), (48, 32), (49, 48)]
)
def test_a_prompt_seen_before_is_computed_from_its_last_block_on(
    num_tokens: int, num_cached: int
) -> None:
    engine = fake_engine()  # blocks of 16
    cached, stats = ask(engine, prompt(num_tokens))
    assert (cached, stats.num_prefix_cache_hits) == (0, 0)
    assert stats.num_prefix_cache_queries == stats.num_prompt_tokens == num_tokens
    cached, stats = ask(engine, prompt(num_tokens))
    assert cached == stats.num_prefix_cache_hits == num_cached
    assert stats.num_prefix_cache_queries == num_tokens
    assert stats.num_prompt_tokens == num_tokens - num_cached


def test_prompts_share_what_they_begin_with() -> None:
    engine = fake_engine()
    ask(engine, prompt(100))
    assert ask(engine, prompt(70) + [99] * 30)[0] == 64
    assert ask(engine, prompt(70) + [99] * 30 + [98])[0] == 96
    assert ask(engine, [41, *prompt(99)])[0] == 0


def test_equal_tokens_in_other_places_are_not_the_same() -> None:
    engine = fake_engine()
    head, tail = prompt(16), prompt(16, first=80)
    ask(engine, head + tail + [50])
    assert ask(engine, [*tail, 50])[0] == 0
    assert ask(engine, tail + head + [50])[0] == 16  # of the request before
    assert ask(engine, head + head + [50])[0] == 16


@pytest.mark.parametrize("skip", [SkipParams(), SKIPPING])
def test_what_was_decoded_is_not_shared(skip: SkipParams) -> None:
    """A second turn has the first turn's prompt for nothing, and computes its answer."""
    engine = fake_engine()
    first_turn = prompt(40)
    ask(engine, first_turn, max_tokens=60, skip=skip)
    answer = counted_up(first_turn[-1], 60)
    second_turn = first_turn + answer + prompt(20, first=70)
    assert ask(engine, second_turn)[0] == 32
    assert ask(engine, second_turn)[0] == 112


def test_a_preempted_sequence_finds_its_own_prompt_again_and_none_of_its_output() -> None:
    runner = FakeRunner(num_kv_blocks=9)
    engine = fake_engine(runner)
    params = SamplingParams(max_tokens=40, skip=SKIPPING)
    for seq_id in range(2):
        engine.add(seq_id, prompt(40, first=40 + seq_id), params)
    outputs, stats = run(engine)
    assert outputs[1][-1].num_preemptions == 1
    assert tokens(outputs[1]) == counted_up(prompt(40, first=41)[-1], 40)
    prefills = [batch for batch in runner.batches if batch.kind == "prefill"]
    assert [[row.num_tokens for row in batch.rows] for batch in prefills[:1]] == [[40, 40]]
    # 40 prompt tokens, 24 of its output: the blocks with its first 32 are still there.
    assert sum(step.num_prompt_tokens for step in stats) < 40 + 40 + 40
    # It is not told as cached, though: that work was this request's own.
    assert outputs[1][0].num_cached_tokens == 0
    assert sum(step.num_prefix_cache_hits for step in stats) == 0
    assert sum(step.num_prefix_cache_queries for step in stats) == 80


def test_equal_prompts_in_one_step_are_both_computed_and_one_is_kept() -> None:
    runner = FakeRunner(num_kv_blocks=16)
    engine = fake_engine(runner)
    for seq_id in range(2):
        engine.add(seq_id, prompt(40), SamplingParams(max_tokens=5))
    outputs, stats = run(engine)
    assert [row.num_tokens for row in runner.batches[0].rows] == [40, 40]
    assert tokens(outputs[0]) == tokens(outputs[1]) == counted_up(prompt(40)[-1], 5)
    assert stats[-1].num_kv_blocks_used == 0
    assert ask(engine, prompt(40))[0] == 32
    assert_pool_is_whole(engine)


def test_chunks_are_shared_before_the_whole_prompt_is_computed() -> None:
    runner = FakeRunner()
    engine = fake_engine(runner, max_num_batched_tokens=32)
    engine.add(0, prompt(80), SamplingParams(max_tokens=5))
    engine.step()
    engine.step()
    engine.add(1, prompt(80), SamplingParams(max_tokens=5))
    outputs, _ = run(engine)
    assert outputs[1][0].num_cached_tokens == 64
    assert runner.batches[2].rows[1].num_tokens == 16  # of the budget, 16 were left


def test_it_can_be_turned_off() -> None:
    engine = fake_engine(enable_prefix_caching=False)
    ask(engine, prompt(40))
    cached, stats = ask(engine, prompt(40))
    assert cached == stats.num_prefix_cache_queries == stats.num_prefix_cache_hits == 0
    assert stats.num_prompt_tokens == 40


# What must not be --------------------------------------------------------------------------------


class Colliding(bytes):
    """Keys whose hashes are all the same: only a comparison can tell them apart."""

    def __hash__(self) -> int:
        return 7


def test_prompts_whose_hashes_collide_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    make_key = BlockManager._key
    monkeypatch.setattr(BlockManager, "_key", lambda *args: Colliding(make_key(*args)))
    engine = fake_engine(FakeRunner(num_kv_blocks=64))
    for first in range(40, 45):
        assert ask(engine, prompt(40, first))[0] == 0
    for first in range(40, 45):
        assert ask(engine, prompt(40, first))[0] == 32
    # The parent's identity is compared as well: the second block of one prompt behind another's.
    assert ask(engine, prompt(40, 40)[:16] + prompt(40, 41)[16:])[0] == 16
    assert len({hash(key) for key in engine._blocks._published}) == 1


def test_a_block_is_not_found_behind_one_that_took_the_place_of_its_parent() -> None:
    blocks = manager()
    params = SamplingParams(max_tokens=1)
    first, second, taker = (Sequence(i, prompt(n), params) for i, n in enumerate([4, 8, 24]))
    for seq in (first, second):  # side by side, so both compute the head, and the first's is kept
        blocks.grow(seq, seq.num_tokens)
        seq.num_computed_tokens = seq.num_tokens
    blocks.publish(first)
    blocks.publish(second)
    assert num_found(blocks, prompt(9)) == 2
    blocks.release(first)
    blocks.grow(taker, 24)  # the whole pool but what the second holds
    assert num_found(blocks, prompt(9)) == 0
    blocks.release(taker)
    blocks.release(computed(blocks, prompt(4)))
    assert num_found(blocks, prompt(9)) == 1, "not safe to say that this is the same head"


def test_what_is_not_computed_is_not_found() -> None:
    blocks = manager()
    computed(blocks, prompt(12), num_tokens=7)
    assert num_found(blocks, prompt(12)) == 1


def test_a_step_that_fails_publishes_nothing_and_withdraws_what_its_sequences_had() -> None:
    def fail(batch: Batch) -> None:
        if any(row.seq.seq_id == 1 and row.seq.num_computed_tokens >= 32 for row in batch.rows):
            raise RuntimeError("out of luck")

    engine = fake_engine(FakeRunner(num_kv_blocks=16, fail=fail), max_num_batched_tokens=32)
    engine.add(1, prompt(80), SamplingParams(max_tokens=5))
    outputs, _ = run(engine)
    assert outputs[1][-1].finish_reason == "error"
    assert ask(engine, prompt(80))[0] == 0
    assert_pool_is_whole(engine)


class BrokenRunner(FakeRunner):
    """Finds no finite logits where sequence 1 samples."""

    def run(self, batch: Batch) -> StepResult:
        result = super().run(batch)
        rows = tuple(
            replace(out, token_id=None, error="logits are not finite")
            if row.seq.seq_id == 1 and row.samples
            else out
            for row, out in zip(batch.rows, result.rows, strict=True)
        )
        return replace(result, rows=rows)


def test_a_row_that_fails_publishes_nothing_and_withdraws_its_earlier_chunks() -> None:
    engine = fake_engine(BrokenRunner(num_kv_blocks=16), max_num_batched_tokens=32)
    engine.add(1, prompt(80), SamplingParams(max_tokens=5))
    engine.add(2, prompt(20, first=70), SamplingParams(max_tokens=5))
    outputs, _ = run(engine)
    assert outputs[1][-1].finish_reason == "error"
    assert outputs[2][-1].finish_reason == "length"
    assert ask(engine, prompt(80))[0] == 0
    assert ask(engine, prompt(20, first=70))[0] == 16
    assert_pool_is_whole(engine)


# The pool ----------------------------------------------------------------------------------------


def test_cached_blocks_are_free_and_blank_ones_are_taken_first() -> None:
    blocks = manager(num_blocks=8)
    blocks.release(computed(blocks, prompt(16)))
    assert (blocks.num_free, blocks.num_used) == (8, 0)
    other = Sequence(2, [99] * 16, SamplingParams(max_tokens=1))
    blocks.grow(other, 16)
    assert num_found(blocks, prompt(17)) == 4, "four were blank"
    blocks.grow(other, 20)
    assert num_found(blocks, prompt(17)) == 3
    blocks.release(other)
    assert blocks.num_free == 8


def test_the_least_recently_used_go_first_and_tails_before_heads() -> None:
    blocks = manager(num_blocks=6)
    for first in (40, 60):
        blocks.release(computed(blocks, prompt(12, first)))
    blocks.release(computed(blocks, prompt(13, 40)[:12]))  # used again, so the other is older
    taker = Sequence(2, [99] * 24, SamplingParams(max_tokens=1))
    found = []
    for num_blocks in range(1, 7):
        blocks.grow(taker, 4 * num_blocks)
        found.append((num_found(blocks, prompt(13, 40)), num_found(blocks, prompt(13, 60))))
    assert found == [(3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)]


def test_blocks_in_use_are_not_evicted() -> None:
    engine = fake_engine(FakeRunner(num_kv_blocks=12), max_model_len=1000)
    engine.add(1, prompt(40), SamplingParams(max_tokens=120))
    engine.step()
    for first in range(50, 60):
        engine.add(100 + first, prompt(60, first), SamplingParams(max_tokens=2))
    engine.add(2, prompt(40), SamplingParams(max_tokens=3))
    outputs, _ = run(engine)
    assert outputs[2][0].num_cached_tokens == 32
    assert len(tokens(outputs[1])) == 119
    assert ask(engine, prompt(60, 50))[0] == 0, "nothing was evicted"
    assert_pool_is_whole(engine)


def test_a_prefix_in_use_takes_no_room_and_a_cached_one_does() -> None:
    engine = fake_engine(FakeRunner(num_kv_blocks=8), max_model_len=1000)
    engine.add(1, prompt(90), SamplingParams(max_tokens=6))  # 6 of 8 blocks
    engine.step()
    engine.add(2, [*prompt(80), 99], SamplingParams(max_tokens=6))
    step = engine.step()
    assert step is not None
    step = engine.step()  # it needs 1 block of its own, and 1 to spare
    assert step is not None
    assert (step.stats.kind, step.stats.num_running) == ("prefill", 2)
    assert step.stats.num_kv_blocks_used == 7
    run(engine)

    # The same prompt, now cached: its 5 blocks and 1 more are not free for the next in line.
    engine.add(3, [*prompt(80), 98], SamplingParams(max_tokens=6))
    engine.add(4, [99] * 20, SamplingParams(max_tokens=6))
    step = engine.step()
    assert step is not None
    assert (step.stats.num_running, step.stats.num_waiting) == (1, 1)
    run(engine)
    assert_pool_is_whole(engine)


def test_an_abort_lets_go_of_shared_blocks_and_leaves_them_to_the_others() -> None:
    engine = fake_engine(FakeRunner(num_kv_blocks=16), max_model_len=1000)
    for seq_id in (1, 2, 3):
        engine.add(seq_id, prompt(65), SamplingParams(max_tokens=20))
        engine.step()
        engine.step()
    engine.abort(1)
    engine.abort(3)
    outputs, stats = run(engine)
    assert len(tokens(outputs[2])) == 20 - 3  # three came with the steps above
    assert stats[-1].num_kv_blocks_used == 0
    assert ask(engine, prompt(65))[0] == 64
    assert_pool_is_whole(engine)


def test_looking_up_a_long_prompt_costs_well_under_a_millisecond() -> None:
    blocks = BlockManager(256, 16)
    prompt_ids = [number % 997 for number in range(2000)]
    blocks.release(computed(blocks, prompt_ids))
    seq = Sequence(1, prompt_ids, SamplingParams(max_tokens=1))

    def once() -> float:
        start_s = time.perf_counter()
        assert len(blocks.find_prefix(seq)) == 124
        return time.perf_counter() - start_s

    assert min(once() for _ in range(20)) < 1e-3  # 0.1 ms on an idle machine
