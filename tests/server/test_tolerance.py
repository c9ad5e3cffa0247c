"""What means the same is answered the same: HEAD, slashes, prefixes of proxies, names."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.server.conftest import MODEL, Server, listening, running

READABLE = [
    "/health", "/ready", "/live", "/metrics", "/version", "/server_info", "/v1/models",
    f"/v1/models/{MODEL}", "/openapi.json", "/docs", "/docs/docs.js",
]  # fmt: skip
BODY = {"prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize("path", READABLE)
async def test_head_tells_what_get_would(server: Server, path: str) -> None:
    whole = await server.http.get(path)
    head = await server.http.head(path)
    assert head.status_code == whole.status_code == 200
    assert head.content == b""
    volatile = {"x-request-id"} | ({"content-length"} if path == "/metrics" else set())
    assert {k: v for k, v in head.headers.items() if k not in volatile} == {
        k: v for k, v in whole.headers.items() if k not in volatile
    }


async def test_head_has_no_body_on_the_wire(server: Server) -> None:
    async with listening(server.app) as url:
        address = httpx.URL(url)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        ask = b"%s /%s HTTP/1.1\r\nhost: x\r\n%s\r\n"
        writer.write(ask % (b"HEAD", b"v1/models", b""))
        writer.write(ask % (b"GET", b"version", b"connection: close\r\n"))
        raw = (await reader.read()).decode()
        writer.close()
    heads = raw.split("HTTP/1.1 200 OK\r\n")
    assert re.search(r"content-length: [1-9]\d+\r\n", heads[1])
    assert heads[1].endswith("\r\n\r\n"), "the next answer follows at once"
    assert '"version"' in heads[2]


async def test_head_of_what_is_posted_is_405(server: Server) -> None:
    assert (await server.http.head("/v1/completions")).status_code == 405


async def test_a_red_probe_is_red_for_head_too(server: Server) -> None:
    server.app.state.lifecycle.begin_drain()
    assert (await server.http.head("/ready")).status_code == 503


@pytest.mark.parametrize("path", READABLE)
async def test_a_slash_at_the_end_changes_nothing(server: Server, path: str) -> None:
    for more in ("/", "//"):
        reply = await server.http.get(path + more)
        assert reply.status_code == 200
        if path not in ("/metrics", "/server_info"):
            assert reply.content == (await server.http.get(path)).content


async def test_a_body_survives_a_slash_at_the_end(server: Server) -> None:
    plain = (await server.post("/v1/completions", BODY)).json()
    slashed = await server.post("/v1/completions/", BODY)
    assert slashed.status_code == 200, "and not a redirect"
    assert slashed.json()["choices"] == plain["choices"]
    metrics = (await server.http.get("/metrics")).text
    assert 'endpoint="completions",finish_reason="length",status="200"} 2.0' in metrics


async def test_slashes_open_nothing_that_wants_a_key() -> None:
    async with running(api_keys=["k"]) as server:
        for path in ("/v1/models/", "/metrics//", "//health", "/health//x", "/docs/../v1/models"):
            assert (await server.http.get(path)).status_code == 401, path
        assert (await server.http.head("/v1/models/")).status_code == 401


@pytest.fixture
async def behind_a_proxy() -> AsyncIterator[Server]:
    async with running(root_path="/llm", api_keys=["k"]) as server:
        yield server


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_a_proxy_may_take_its_prefix_away_or_not(behind_a_proxy: Server, prefix: str) -> None:
    http, key = behind_a_proxy.http, {"authorization": "Bearer k"}
    assert (await http.get(f"{prefix}/health")).status_code == 200
    assert (await http.get(f"{prefix}/v1/models")).status_code == 401
    assert (await http.get(f"{prefix}/v1/models/", headers=key)).status_code == 200
    reply = await http.post(f"{prefix}/v1/completions", json=BODY, headers=key)
    assert reply.status_code == 200
    assert reply.headers["x-request-id"]
    document = (await http.get(f"{prefix}/openapi.json", headers=key)).json()
    assert document["servers"] == [{"url": "/llm"}]
    assert 'src="/llm/docs/docs.js"' in (await http.get(f"{prefix}/docs")).text


async def test_another_prefix_is_unknown(behind_a_proxy: Server) -> None:
    key = {"authorization": "Bearer k"}
    for path in ("/llmx/health", "/other/health"):
        assert (await behind_a_proxy.http.get(path, headers=key)).status_code == 404


async def test_a_model_answers_to_all_of_its_names_and_says_the_first() -> None:
    async with running(model_aliases=("gpt-x", "org/name")) as server:
        listed = (await server.http.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == [MODEL, "gpt-x", "org/name"]
        for name in (MODEL, "gpt-x", "org/name"):
            assert (await server.http.get(f"/v1/models/{name}")).json()["id"] == name
            assert (await server.complete(model=name, max_tokens=1)).json()["model"] == MODEL
        assert (await server.complete(model="gpt-y")).status_code == 404
