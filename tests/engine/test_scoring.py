"""What an engine tells of prompts: log-probabilities of their tokens, and what they skipped."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from skipllm_core.client import RequestStream
from skipllm_core.engine.engine import Engine
from skipllm_core.types import SamplingParams, SeqOutput, SkipParams, StepOutput, TokenLogprobs
from tests.engine.test_scheduler import SKIPPING, counted_up, run, tokens
from tests.fakes import FakeRunner, fake_engine, prompt_logprob

SKIPPING_PROMPT = replace(SKIPPING, prompt=True)


def told(outputs: list[SeqOutput]) -> list[TokenLogprobs]:
    return [found for output in outputs for found in output.prompt_logprobs]


def scores(prompt_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    return [prompt_logprob(*place, num_top) for place in list(enumerate(prompt_ids))[1:]]


def ask(
    engine: Engine,
    prompt_ids: list[int],
    max_tokens: int = 2,
    skip: SkipParams | None = None,
    prompt_logprobs: int | None = None,
) -> list[SeqOutput]:
    params = SamplingParams(
        max_tokens=max_tokens, skip=skip or SkipParams(), prompt_logprobs=prompt_logprobs
    )
    engine.add(0, prompt_ids, params)
    return run(engine)[0][0]


@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 40])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_a_prompt_is_scored_and_then_continued(num_prompt_tokens: int, max_tokens: int) -> None:
    prompt = counted_up(40, num_prompt_tokens)
    outputs = ask(fake_engine(), prompt, max_tokens, prompt_logprobs=1)
    assert told(outputs) == scores(prompt, 1)
    assert tokens(outputs) == counted_up(prompt[-1], max_tokens)
    assert outputs[-1].finish_reason == "length"
    assert len(outputs) == max(1, max_tokens)


def test_nothing_is_scored_unless_asked_for() -> None:
    assert told(ask(fake_engine(), [40] * 40)) == []


def test_a_long_prompt_is_told_of_step_by_step() -> None:
    prompt = counted_up(40, 100)
    engine = fake_engine(max_num_batched_tokens=32, max_num_seqs=4)
    outputs = ask(engine, prompt, max_tokens=0, prompt_logprobs=2)
    assert [len(output.prompt_logprobs) for output in outputs] == [32, 32, 32, 3]
    assert told(outputs) == scores(prompt, 2)
    assert [output.queue_s is None for output in outputs] == [True, True, True, False]
    assert [output.finish_reason for output in outputs] == [None, None, None, "length"]


def test_without_tokens_a_prompt_may_fill_the_context_and_takes_no_more_blocks() -> None:
    engine = fake_engine(FakeRunner(num_kv_blocks=4), max_model_len=64)
    for _ in range(2):
        outputs = ask(engine, [40] * 64, max_tokens=0)
        assert [output.finish_reason for output in outputs] == ["length"]
        assert tokens(outputs) == []


def test_what_is_scored_is_not_taken_from_the_cache_but_may_be_found_there() -> None:
    engine = fake_engine()
    prompt = counted_up(40, 60)
    for prompt_logprobs, num_cached in ((0, 0), (None, 48), (0, 0)):
        outputs = ask(engine, prompt, prompt_logprobs=prompt_logprobs)
        assert outputs[0].num_cached_tokens == num_cached
        assert len(told(outputs)) == (0 if prompt_logprobs is None else 59)


@pytest.mark.parametrize("skip", [SkipParams(), SKIPPING_PROMPT], ids=["full", "skipping"])
def test_a_preemption_amid_the_prompt_has_nothing_told_twice(skip: SkipParams) -> None:
    engine = fake_engine(FakeRunner(num_kv_blocks=36, block_size=4))
    engine.add(0, [40] * 5, SamplingParams(max_tokens=60, skip=skip))
    engine.step()  # from now on it is decoded between the pieces of the other's prompt
    prompt = counted_up(50, 128)
    engine.add(1, prompt, SamplingParams(max_tokens=3, prompt_logprobs=0, skip=skip))
    outputs, stats = run(engine)
    assert outputs[1][-1].num_preemptions > 0
    assert 0 < len(outputs[1][0].prompt_logprobs) < 127
    assert told(outputs[1]) == scores(prompt, 0)
    usage = outputs[1][-1].skip_usage
    assert usage is not None
    assert usage.total_ffn_blocks == 4 * (2 + 127 * skip.prompt)
    assert usage.skipped_ffn_blocks == (2 + 126) * skip.prompt
    counted = [step.ffn_computed[0] + step.ffn_skipped[0] for step in stats if step.ffn_skipped]
    assert sum(counted) == 59 + 2 + 127 * skip.prompt


def test_a_prompt_under_the_policy_is_counted_as_if_it_had_been_decoded() -> None:
    whole = ask(fake_engine(), counted_up(40, 11), max_tokens=1, skip=SKIPPING_PROMPT)[-1]
    decoded = ask(fake_engine(), counted_up(40, 1), max_tokens=11, skip=SKIPPING)[-1]
    assert whole.skip_usage == decoded.skip_usage
    assert whole.skip_usage is not None
    assert whole.skip_usage.skipped_ffn_blocks == 9


def test_the_metrics_see_a_prompt_under_the_policy() -> None:
    engine = fake_engine()
    engine.add(0, [40] * 11, SamplingParams(max_tokens=1, skip=SKIPPING_PROMPT))
    engine.add(1, [40] * 30, SamplingParams(max_tokens=1, skip=SKIPPING))
    (prefill,) = run(engine)[1]
    assert prefill.ffn_computed == (10, 10, 1, 10)
    assert prefill.ffn_skipped == (0, 0, 9, 0)
    assert prefill.num_prompt_tokens == 41


def test_a_prompt_under_the_policy_is_shared_with_nobody() -> None:
    engine = fake_engine()
    prompt = counted_up(40, 60)
    for skip, num_cached in (
        (SKIPPING_PROMPT, 0),  # nothing is there; what it computes the next does not find
        (SKIPPING, 0),
        (SKIPPING_PROMPT, 0),
        (SkipParams(), 48),
        (SkipParams(prompt=True), 48),  # `never` is in full, whatever it is asked for
    ):
        assert ask(engine, prompt, skip=skip)[0].num_cached_tokens == num_cached


def test_the_wire_bears_all_of_it() -> None:
    engine = fake_engine()
    engine.add(0, [40] * 5, SamplingParams(max_tokens=0, prompt_logprobs=2, skip=SKIPPING_PROMPT))
    step = engine.step()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=StepOutput) == step


async def test_a_reader_that_lags_finds_all_of_it_in_one_output() -> None:
    prompt = counted_up(40, 100)
    engine = fake_engine(max_num_batched_tokens=32, max_num_seqs=4)
    stream = RequestStream(0, len(prompt), lambda stream: None)
    for output in ask(engine, prompt, max_tokens=2, prompt_logprobs=1):
        stream.push(output)
    (merged,) = [output async for output in stream]
    assert merged.prompt_logprobs == tuple(scores(prompt, 1))
    assert merged.token_ids == tuple(counted_up(prompt[-1], 2))
    assert merged.queue_s is not None
    assert merged.num_cached_tokens == 0
