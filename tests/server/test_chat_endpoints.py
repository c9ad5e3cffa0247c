"""What all endpoints that chat have in common, whatever words each has for it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import Server, listening, running
from tests.server.test_connections import until

USER = {"role": "user", "content": "hi"}
ENDPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [USER]}),
    "messages": ("/v1/messages", {"messages": [USER], "max_tokens": 3000}),
    "responses": ("/v1/responses", {"input": [USER]}),
}


@pytest.fixture(params=ENDPOINTS)
def endpoint(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
async def slow() -> AsyncIterator[Server]:
    """One slow sequence at a time; one more may wait."""
    async with running(
        max_model_len=5000,
        max_num_seqs=1,
        max_num_queued_reqs=1,
        runner={"step_s": 0.005, "num_kv_blocks": 400},
    ) as server:
        yield server


def num_requests(server: Server, endpoint: str, status: int, reason: str) -> float | None:
    labels = {"endpoint": endpoint, "status": str(status), "finish_reason": reason}
    registry = server.app.state.metrics.registry
    value: float | None = registry.get_sample_value("skipllm_requests_total", labels)
    return value


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_aborted(slow: Server, endpoint: str, stream: bool) -> None:
    path, body = ENDPOINTS[endpoint]
    async with listening(slow.app) as url, httpx.AsyncClient(base_url=url) as http:
        asking = asyncio.create_task(http.post(path, json=body | {"stream": stream}))
        await until(lambda: len(slow.runner.batches) > 3)
        asking.cancel()
        assert await until(lambda: slow.engine.num_unfinished == 0) < 0.25
        await until(lambda: num_requests(slow, endpoint, 499, "abort") == 1)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_full_queue_is_told_before_the_first_byte(
    slow: Server, endpoint: str, stream: bool
) -> None:
    path, body = ENDPOINTS[endpoint]
    body = body | {"stream": stream}
    asking = [asyncio.create_task(slow.post(path, body)) for _ in range(2)]
    await until(lambda: slow.engine.num_unfinished == 2)
    reply = await slow.post(path, body)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    assert reply.status_code == 503
    assert reply.headers["retry-after"]
    assert "overloaded" in reply.json()["error"]["message"]
    assert num_requests(slow, endpoint, 503, "none") == 1


async def test_a_stream_that_outlasts_the_drain_ends_with_the_endpoints_own_error(
    slow: Server, endpoint: str
) -> None:
    path, body = ENDPOINTS[endpoint]
    asking = asyncio.create_task(slow.post(path, body | {"stream": True}))
    await until(lambda: len(slow.runner.batches) > 3)
    lifecycle = slow.app.state.lifecycle
    lifecycle.begin_drain()
    refused = await slow.post(path, body)
    assert not await lifecycle.wait_drained(0.01)
    reply = await asking
    assert refused.status_code == 503
    last = json.loads(reply.text.removesuffix("\n\n").rpartition("data: ")[2])
    assert "shutting down" in last["error"]["message"]
    assert last.get("type") == (None if endpoint == "chat" else "error")
    assert slow.engine.num_unfinished == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": [{"role": "user", "content": "x"}] * 4096}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": ""}] * 10**5}]},
        ),
        ("/v1/responses", {"input": "x", "metadata": {str(i): "" for i in range(10**5)}}),
        (
            "/v1/messages",
            {"max_tokens": 1, "messages": [
                {"role": "user", "content": [{"type": "text", "text": ""}] * 8192}
            ]},
        ),
        (
            "/v1/messages",
            {"max_tokens": 1, "messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "x", "content": [{}] * 10**5}
            ]}]},
        ),
        (
            "/v1/messages",
            {"max_tokens": 1, "messages": [USER], "system": [{"type": "text"}] * 10**5},
        ),
    ],
)  # fmt: skip
async def test_many_parts_do_not_hold_the_event_loop(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    content = json.dumps(body).encode()
    start_s = time.thread_time()
    reply = await server.http.post(path, content=content)
    took_s = time.thread_time() - start_s
    assert reply.status_code == 400
    assert took_s < 2.0  # many times what it takes alone
