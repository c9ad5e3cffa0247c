"""A stream whose first token takes long, over real sockets: nobody takes it for dead."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from server import sse
from server.routes import answering
from skipllm_core.engine.runner import Batch
from tests.server.conftest import Server, listening, running
from tests.server.test_answers import events

STREAM = {"prompt": "a", "max_tokens": 3, "stream": True}
PAUSE_S = 0.1  # before the headers, and between comments


@dataclass
class Slow:
    """A server whose engine computes nothing until it is let go on."""

    server: Server
    http: httpx.AsyncClient
    go_on: threading.Event
    fails: bool = False


@pytest.fixture
async def slow(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Slow]:
    monkeypatch.setattr(answering, "HELD_S", PAUSE_S)
    monkeypatch.setattr(sse, "_PING_S", PAUSE_S)
    go_on = threading.Event()

    def wait(_batch: Batch) -> None:
        assert go_on.wait(60)
        if slow.fails:
            raise RuntimeError("told to fail")

    async with (
        running(runner={"fail": wait}) as server,
        listening(server.app) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as http,
    ):
        slow = Slow(server, http, go_on)
        try:
            yield slow
        finally:
            go_on.set()


async def test_headers_and_comments_come_before_the_first_token(slow: Slow) -> None:
    async with slow.http.stream("POST", "/v1/completions", json=STREAM) as reply:
        assert reply.status_code == 200
        text = ""
        async for piece in reply.aiter_text():
            text += piece
            if text.count(": keep-alive") >= 3:
                slow.go_on.set()
    comments, _, rest = text.rpartition(": keep-alive\n\n")
    assert not slow.server.engine.num_unfinished
    assert set(comments.split("\n\n")) <= {": keep-alive", ""}
    assert "".join(chunk["choices"][0]["text"] for chunk in events(rest)) == "bcd"


async def test_a_failure_after_the_headers_is_an_event(slow: Slow) -> None:
    slow.fails = True
    async with slow.http.stream("POST", "/v1/completions", json=STREAM) as reply:
        assert reply.status_code == 200
        slow.go_on.set()
        text = (await reply.aread()).decode()
    assert '"type":"server_error"' in text.rpartition("data: ")[2]
    assert "[DONE]" not in text


async def test_a_failure_before_them_has_its_status(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "HELD_S", 60.0)
    slow.fails = True
    slow.go_on.set()
    reply = await slow.http.post("/v1/completions", json=STREAM)
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"


async def test_a_client_that_leaves_before_the_first_token_is_aborted(slow: Slow) -> None:
    async with slow.http.stream("POST", "/v1/completions", json=STREAM) as reply:
        assert reply.status_code == 200
    for _ in range(200):
        if not slow.server.app.state.lifecycle.num_running:
            break
        await asyncio.sleep(0.01)
    assert slow.server.app.state.lifecycle.num_running == 0


async def test_a_whole_answer_is_waited_for(slow: Slow) -> None:
    waiting = asyncio.create_task(slow.server.complete("a", max_tokens=3))
    await asyncio.sleep(3 * PAUSE_S)
    slow.go_on.set()
    reply = await waiting
    assert reply.json()["choices"][0]["text"] == "bcd"
