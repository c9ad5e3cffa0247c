"""Over real sockets: clients that leave, a server that drains, the bytes, and OpenAI's client."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import MODEL, Server, listening, make_profile, running

LONG = {"prompt": "a", "max_tokens": 4000}


@dataclass
class Live:
    server: Server
    url: str

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def requests(self, status: int, reason: str) -> float | None:
        labels = {"endpoint": "completions", "status": str(status), "finish_reason": reason}
        registry = self.server.app.state.metrics.registry
        value: float | None = registry.get_sample_value("skipllm_requests_total", labels)
        return value


@pytest.fixture
async def live() -> AsyncIterator[Live]:
    """One slow sequence at a time, so that others queue."""
    async with (
        running(
            max_model_len=5000,
            max_num_seqs=1,
            runner={"step_s": 0.005, "num_kv_blocks": 400},
            skip_profile=make_profile(),
        ) as server,
        listening(server.app) as url,
    ):
        yield Live(server, url)


async def post_raw(live: Live, body: dict[str, Any]) -> tuple[Any, Any]:
    """A request whose connection can be cut at any moment."""
    reader, writer = await asyncio.open_connection(*live.address)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    return reader, writer


async def until(is_so: Callable[[], bool], timeout_s: float = 5) -> float:
    """How long it took, in seconds."""
    start_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - start_s < timeout_s, "it never came"
        await asyncio.sleep(0.002)
    return time.monotonic() - start_s


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_aborted_within_250_ms(live: Live, stream: bool) -> None:
    engine = live.server.engine
    reader, writer = await post_raw(live, LONG | {"stream": stream})
    if stream:
        await reader.readuntil(b"data: ")
    else:
        await until(lambda: len(live.server.runner.batches) > 3)
    assert engine.num_unfinished == 1
    writer.transport.abort()
    assert await until(lambda: engine.num_unfinished == 0) < 0.25
    await until(lambda: live.server.app.state.lifecycle.num_running == 0)
    assert live.requests(499, "abort") == 1
    num_steps = len(live.server.runner.batches)
    await asyncio.sleep(0.1)
    assert len(live.server.runner.batches) <= num_steps + 2, "the engine has dropped it too"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_the_queue_is_aborted_too(live: Live, stream: bool) -> None:
    engine = live.server.engine
    _, first = await post_raw(live, LONG)
    await until(lambda: engine.num_unfinished == 1)
    _, queued = await post_raw(live, LONG | {"stream": stream})
    await until(lambda: engine.num_unfinished == 2)
    queued.transport.abort()
    assert await until(lambda: engine.num_unfinished == 1) < 0.25
    first.transport.abort()
    await until(lambda: engine.num_unfinished == 0)
    assert live.requests(499, "abort") == 2


async def test_a_client_that_does_not_read_loses_its_place(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.sse._SEND_TIMEOUT_S", 0.2)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(deaf, live.address)
        content = json.dumps(LONG | {"stream": True, "request_id": "x" * 128}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        await loop.sock_sendall(deaf, head.encode() + content)
        await until(lambda: live.server.engine.num_unfinished == 1)
        await until(lambda: live.server.engine.num_unfinished == 0)
        await until(lambda: live.requests(499, "abort") == 1)
    assert len(live.server.runner.batches) < 3000, "long before its end"


async def test_a_client_that_leaves_while_uploading_is_forgotten(live: Live) -> None:
    _, writer = await asyncio.open_connection(*live.address)
    writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"pro')
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()
    await until(lambda: live.requests(499, "none") == 1)


async def test_the_bytes_of_a_stream_are_events_with_line_feeds_alone(live: Live) -> None:
    reader, writer = await post_raw(live, {"prompt": "a", "max_tokens": 3, "stream": True})
    raw = b""
    while b"[DONE]\n\n" not in raw:
        raw += await reader.read(1000)
    writer.close()
    _, _, body = raw.partition(b"\r\n\r\n")
    texts = [line for line in body.split(b"\r\n") if line.startswith(b"data: ")]  # of the chunks
    joined = b"".join(texts)
    assert joined.endswith(b"data: [DONE]\n\n")
    for event in joined.removesuffix(b"\n\n").split(b"\n\n"):
        assert event.startswith(b"data: ")
        assert b"\n" not in event


@pytest.mark.parametrize(
    "raw", [b"BREW / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nno header\r\n\r\n"]
)
async def test_what_is_no_http_is_refused_in_the_form_of_all_errors(live: Live, raw: bytes) -> None:
    reader, writer = await asyncio.open_connection(*live.address)
    writer.write(raw)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nx-request-id: " in head
    assert f"content-length: {len(body)}".encode() in head
    error = json.loads(body)["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == "invalid_request_error"


async def test_running_streams_finish_while_draining_and_new_requests_are_refused(
    live: Live,
) -> None:
    lifecycle = live.server.app.state.lifecycle
    async with httpx.AsyncClient(base_url=live.url) as http:
        body = {"prompt": "a", "max_tokens": 60, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.aiter_lines()
            await anext(lines)
            lifecycle.begin_drain()
            drained = asyncio.create_task(lifecycle.wait_drained(10))
            assert (await http.get("/ready")).status_code == 503
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/live")).status_code == 200
            refused = await http.post("/v1/completions", json=body)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert not drained.done()
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        assert await drained is True


@pytest.mark.parametrize("stream", [True, False])
async def test_what_outlasts_the_drain_is_told(live: Live, stream: bool) -> None:
    lifecycle = live.server.app.state.lifecycle
    async with httpx.AsyncClient(base_url=live.url) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=LONG | {"stream": stream}))
        await until(lambda: len(live.server.runner.batches) > 3)
        lifecycle.begin_drain()
        assert await lifecycle.wait_drained(0.05) is False
        reply = await asking
    if stream:
        last = reply.text.removesuffix("\n\n").rpartition("\n\n")[2]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert "[DONE]" not in reply.text
    else:
        assert reply.status_code == 503
        assert "shutting down" in reply.json()["error"]["message"]
    assert live.server.engine.num_unfinished == 0


@pytest.fixture
async def client(live: Live) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{live.url}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


async def test_openais_client_chats_streaming_and_not(client: openai.AsyncOpenAI) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 30,
        "extra_body": {"skip": {"ratio": 0.2}},
    }
    whole = await client.chat.completions.create(**request)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 30
    assert whole.usage.model_extra is not None
    assert whole.usage.model_extra["skip"]["token_skip_ratio"] > 0
    options = {"include_usage": True}
    stream = await client.chat.completions.create(**request, stream=True, stream_options=options)
    chunks = [chunk async for chunk in stream]
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(parts) > 5
    assert "".join(parts) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    but = {"prompt_tokens_details"}  # the second time, the prompt's first block is cached
    assert chunks[-1].usage.model_dump(exclude=but) == whole.usage.model_dump(exclude=but)


async def test_openais_client_completes_streaming_and_not(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model=MODEL, prompt=["a", "k"], max_tokens=5)
    assert [choice.text for choice in whole.choices] == ["bcdef", "lmnop"]
    stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=5, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "bcdef"


async def test_openais_client_lists_the_model(client: openai.AsyncOpenAI) -> None:
    (card,) = [card async for card in client.models.list()]
    assert card == await client.models.retrieve(MODEL)
    assert card.model_extra is not None
    assert card.model_extra["max_model_len"] == 5000


async def test_openais_client_raises_its_own_exceptions(
    live: Live, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="x", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model=MODEL, prompt="a", temperature=3)
    assert (bad.value.param, bad.value.code) == ("temperature", "decimal_above_max_value")
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError, match="maximum context length is"):
        await client.completions.create(model=MODEL, prompt=[1] * 5000)
    live.server.app.state.lifecycle.begin_drain()
    with pytest.raises(openai.InternalServerError) as draining:
        await client.completions.create(model=MODEL, prompt="a")
    assert draining.value.status_code == 503


async def test_openais_client_raises_an_error_that_comes_in_the_stream(
    live: Live, client: openai.AsyncOpenAI
) -> None:
    stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=4000, stream=True)
    await anext(aiter(stream))
    await live.server.app.state.lifecycle.wait_drained(0)
    with pytest.raises(openai.APIError, match="shutting down"):
        async for _ in stream:
            pass
