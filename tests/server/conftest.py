"""The application over a fake model: the whole server but the sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from server.app import build_app
from server.cli.launch import HTTPProtocol
from skipllm_core.client import InProcessEngineClient
from skipllm_core.config import EngineConfig
from skipllm_core.engine.engine import Engine
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.tokenizer import ByteTokenizer
from tests.fakes import FakeRunner, NextToken, count_up
from tests.skip.profiles import neuron_point, point, profile

MODEL = "fake"


def make_profile(num_layers: int = 4) -> SkipProfile:
    return profile(
        point(0.25, 0.9, region=(1, 3)),
        neurons=(neuron_point(0.25, num_layers=num_layers, kl=0.02),),
        num_layers=num_layers,
        cold_start=1,
        cold_end=3,
        warmup_tokens=2,
    )


@dataclass
class Server:
    app: FastAPI
    engine: InProcessEngineClient
    runner: FakeRunner
    http: httpx.AsyncClient

    async def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **kwargs)

    async def chat(self, content: str = "hi", **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return await self.post("/v1/chat/completions", {"messages": messages, **body})

    async def complete(self, prompt: Any = "hi", **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"prompt": prompt, **body})


@asynccontextmanager
async def running(
    next_token: NextToken = count_up,
    *,
    max_model_len: int = 128,
    max_num_seqs: int = 8,
    max_num_queued_reqs: int = 16,
    runner_type: type[FakeRunner] = FakeRunner,
    runner: dict[str, Any] | None = None,
    **app_options: Any,
) -> AsyncIterator[Server]:
    fake = runner_type(next_token, **(runner or {}))
    config = EngineConfig(model_dir=Path(), max_num_seqs=max_num_seqs)
    engine = InProcessEngineClient(
        lambda: Engine(fake, config, max_model_len, load_tokenizer=ByteTokenizer),
        max_num_queued_reqs=max_num_queued_reqs,
    )
    await engine.start()
    app = build_app(engine, ByteTokenizer(), model_name=MODEL, **app_options)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield Server(app, engine, fake, http)
    finally:
        await engine.close()


class _HTTPServer(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[str]:
    """The application behind a real uvicorn on loopback; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # soon full
        http = _HTTPServer(
            uvicorn.Config(app, http=HTTPProtocol, lifespan="off", ws="none", log_config=None)
        )
        serving = asyncio.create_task(http.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            http.should_exit = True
            await serving


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running(skip_profile=make_profile()) as server:
        yield server
