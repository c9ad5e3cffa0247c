"""What every client promises, shown on the engine that runs in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from skipllm_core.client import InProcessEngineClient, RequestStream
from skipllm_core.engine.engine import Engine
from skipllm_core.engine.runner import Batch
from skipllm_core.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
)
from skipllm_core.types import SamplingParams, SeqOutput, StepStats
from tests.fakes import FakeRunner, fake_engine


class Gate:
    """Holds the engine's forward back until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, batch: Batch) -> None:
        self.reached.set()
        assert self._open.wait(10)

    def open(self) -> None:
        self._open.set()


@asynccontextmanager
async def started(
    build_engine: Callable[[], Engine] = fake_engine,
    *,
    max_num_queued_reqs: int = 256,
    max_queued_tokens: int = 1_000_000,
) -> AsyncIterator[InProcessEngineClient]:
    client = InProcessEngineClient(
        build_engine, max_num_queued_reqs=max_num_queued_reqs, max_queued_tokens=max_queued_tokens
    )
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def params(max_tokens: int = 5) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


async def read(stream: RequestStream) -> list[SeqOutput]:
    return [output async for output in stream]


async def until(fact: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not fact():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def tokens(outputs: list[SeqOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


async def test_a_stream_brings_every_token_and_then_ends() -> None:
    steps: list[StepStats] = []
    async with started() as client:
        client.on_step.append(steps.append)
        stream = client.submit([40, 41], params())
        assert client.num_unfinished == 1
        outputs = await read(stream)
        assert stream.num_prompt_tokens == 2
        assert tokens(outputs) == [42, 43, 44, 45, 46]
        assert outputs[-1].finish_reason == "length"
        assert client.num_unfinished == 0
        assert await read(stream) == []
    assert sum(step.num_generated_tokens for step in steps) == 5


async def test_a_reader_that_lags_finds_what_it_missed_in_one_output() -> None:
    is_first_read = threading.Event()

    def wait(batch: Batch) -> None:
        assert batch.kind == "prefill" or is_first_read.wait(10)

    async with started(lambda: fake_engine(FakeRunner(fail=wait))) as client:
        stream = client.submit([40], params(200))
        first = await anext(stream)
        is_first_read.set()
        await until(lambda: client.num_unfinished == 0)
        rest = await anext(stream)
        assert tokens([first, rest]) == [32 + (9 + i) % 95 for i in range(200)]
        assert first.queue_s is not None
        assert rest.finish_reason == "length"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_what_the_first_output_tells_is_not_lost_on_a_reader_that_lags() -> None:
    stream = RequestStream(0, 20, lambda stream: None)
    stream.push(SeqOutput(seq_id=0, token_ids=(1,), queue_s=0.5, num_cached_tokens=16))
    stream.push(SeqOutput(seq_id=0, token_ids=(2,)))
    output = await anext(stream)
    assert (output.token_ids, output.queue_s, output.num_cached_tokens) == ((1, 2), 0.5, 16)


async def test_streams_do_not_mix() -> None:
    async with started() as client:
        streams = client.submit_all([([40 + i], params(20)) for i in range(10)])
        results = await asyncio.gather(*map(read, streams))
        for i, outputs in enumerate(results):
            assert tokens(outputs) == list(range(41 + i, 61 + i))


async def test_closing_a_stream_ends_its_iteration_and_frees_its_blocks() -> None:
    last: list[StepStats] = []
    async with started(lambda: fake_engine(FakeRunner(step_s=0.001))) as client:
        client.on_step.append(last.append)
        stream = client.submit([40], params(500))
        reader = asyncio.create_task(read(stream))
        await until(lambda: bool(last))
        stream.close()
        stream.close()
        assert client.num_unfinished == 0
        await asyncio.wait_for(reader, 1)
        await read(client.submit([40], params(3)))
        assert last[-1].num_kv_blocks_used == 0
        assert last[-1].num_running == 0


async def test_closing_a_finished_stream_aborts_nothing() -> None:
    async with started() as client:
        stream = client.submit([40], params())
        await read(stream)
        stream.close()
        assert await read(stream) == []
        assert len(tokens(await read(client.submit([40], params())))) == 5


@pytest.mark.parametrize(
    ("prompt_ids", "max_tokens", "error", "param"),
    [
        ([], 1, InvalidRequestError, "prompt"),
        ([40] * 512, 1, ContextLengthError, None),
        ([40] * 511, 1, None, None),
        ([40, 320], 1, InvalidRequestError, "prompt"),
        ([40, -1], 1, InvalidRequestError, "prompt"),
        ([40] * 512, 0, None, None),
        ([40] * 513, 0, ContextLengthError, None),
        ([40], -1, InvalidRequestError, "max_tokens"),
        ([40] * 100, 157, None, None),
        ([40] * 100, 158, InvalidRequestError, "max_tokens"),
    ],
)
async def test_what_can_never_run_is_refused_at_once(
    prompt_ids: list[int], max_tokens: int, error: type[InvalidRequestError] | None, param: str
) -> None:
    num_kv_blocks = 32 if len(prompt_ids) > 500 else 16  # of 16 tokens
    async with started(lambda: fake_engine(FakeRunner(num_kv_blocks=num_kv_blocks))) as client:
        if error is None:
            outputs = await read(client.submit(prompt_ids, params(max_tokens)))
            assert len(tokens(outputs)) == max_tokens
        else:
            with pytest.raises(error) as refusal:
                client.submit(prompt_ids, params(max_tokens))
            assert refusal.value.param == param
            assert client.num_unfinished == 0


async def test_the_context_error_names_both_numbers() -> None:
    async with started() as client:
        with pytest.raises(ContextLengthError, match=r"512 tokens.*600 tokens") as refusal:
            client.submit([40] * 600, params())
        assert refusal.value.code == "context_length_exceeded"


async def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    async with started() as client:
        with pytest.raises(InvalidRequestError) as refusal:
            client.submit([40], SamplingParams(max_tokens=1, logit_bias=((320, 1.0),)))
        assert refusal.value.param == "logit_bias"


async def test_a_full_queue_refuses_at_once_and_takes_requests_again_later() -> None:
    gate = Gate()
    build = lambda: fake_engine(FakeRunner(fail=gate), max_num_seqs=2)  # noqa: E731
    async with started(build, max_num_queued_reqs=3) as client:
        streams = client.submit_all([([40], params())] * 4)
        with pytest.raises(OverloadedError) as refusal:
            client.submit_all([([40], params())] * 2)
        assert refusal.value.retry_after_s > 0
        assert client.num_unfinished == 4, "all or none"
        streams.append(client.submit([40], params()))
        with pytest.raises(OverloadedError):
            client.submit([40], params())
        gate.open()
        for stream in streams:
            assert len(tokens(await read(stream))) == 5
        assert len(tokens(await read(client.submit([40], params())))) == 5


async def test_waiting_prompt_tokens_are_bounded_and_running_ones_do_not_count() -> None:
    gate = Gate()
    async with started(lambda: fake_engine(FakeRunner(fail=gate)), max_queued_tokens=150) as client:
        streams = [client.submit([40] * 100, params())]
        with pytest.raises(OverloadedError, match="tokens"):
            client.submit([40] * 100, params())
        streams.append(client.submit([40] * 50, params()))
        gate.open()
        for stream in streams:
            await read(stream)
        first = client.submit([40] * 200, params())  # alone it is let in, however long
        await read(first)


async def test_more_sequences_than_the_queue_ever_holds_are_invalid_and_not_overload() -> None:
    async with started(lambda: fake_engine(max_num_seqs=2), max_num_queued_reqs=3) as client:
        with pytest.raises(InvalidRequestError, match=r"6 sequences.*at most 5"):
            client.submit_all([([40], params())] * 6)
        assert client.num_unfinished == 0


async def test_the_time_in_the_queue_starts_at_submit() -> None:
    gate = Gate()
    async with started(lambda: fake_engine(FakeRunner(fail=gate))) as client:
        first = client.submit([40], params(1))
        await asyncio.to_thread(gate.reached.wait, 10)
        second = client.submit([40], params(1))  # unseen by the engine while its step lasts
        await asyncio.sleep(0.2)
        gate.open()
        await read(first)
        (output,) = await read(second)
        assert output.queue_s is not None
        assert output.queue_s >= 0.2


async def test_a_start_that_is_cancelled_leaves_no_thread() -> None:
    building, go_on = threading.Event(), threading.Event()

    def build() -> Engine:
        building.set()
        assert go_on.wait(10)
        return fake_engine()

    client = InProcessEngineClient(build)
    start = asyncio.create_task(client.start())
    await asyncio.to_thread(building.wait, 10)
    start.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert "engine" not in [thread.name for thread in threading.enumerate()]
    assert client.health().state == "dead"


async def test_an_engine_that_cannot_be_built_says_why() -> None:
    def refuse() -> Engine:
        raise ConfigError("no such model")

    client = InProcessEngineClient(refuse)
    assert client.health().state == "starting"
    with pytest.raises(ConfigError, match="no such model"):
        await client.start()
    assert client.health().state == "dead"
    await client.close()


async def test_an_engine_that_dies_fails_its_streams_and_takes_no_more() -> None:
    gate = Gate()

    def fail(batch: Batch) -> None:
        if batch.kind == "decode":
            gate(batch)
            raise RuntimeError("the device is gone")

    async with started(lambda: fake_engine(FakeRunner(fail=fail), max_num_seqs=1)) as client:
        streams = client.submit_all([([40], params())] * 4)
        gate.open()
        for stream in streams[:2]:  # a step that fails costs its own sequence,
            assert (await read(stream))[-1].finish_reason == "error"
        for stream in streams[2:]:  # and the third in a row the engine
            with pytest.raises(EngineDeadError):
                await read(stream)
            stream.close()
        assert client.health().state == "dead"
        assert client.num_unfinished == 0
        with pytest.raises(EngineDeadError):
            client.submit([40], params())


async def test_closing_the_client_fails_open_streams() -> None:
    async with started(lambda: fake_engine(FakeRunner(step_s=0.001))) as client:
        stream = client.submit([40], params(500))
        await anext(stream)
    with pytest.raises(EngineDeadError):
        await read(stream)
    await client.close()
