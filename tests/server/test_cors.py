"""Pages of other origins: nothing by default, and what the operator allows."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from server.cors import CrossOrigin
from tests.server.conftest import Server, running

PAGE = "https://chat.example"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}
CHAT = "/v1/chat/completions"


@pytest.fixture
async def allowing() -> AsyncIterator[Server]:
    rules = CrossOrigin(origins=(PAGE, "http://localhost:3000"))
    async with running(api_keys=["k"], cross_origin=rules) as server:
        yield server


def allowed(reply: httpx.Response) -> str | None:
    return reply.headers.get("access-control-allow-origin")


async def test_no_origin_is_allowed_unless_told(server: Server) -> None:
    preflight = await server.http.options(CHAT, headers=PREFLIGHT)
    assert preflight.status_code == 405
    assert allowed(preflight) is None
    assert allowed(await server.http.get("/v1/models", headers={"origin": PAGE})) is None


async def test_a_preflight_is_answered_without_a_key(allowing: Server) -> None:
    reply = await allowing.http.options(CHAT, headers=PREFLIGHT)
    assert reply.status_code == 200
    assert allowed(reply) == PAGE
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"]
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {"authorization": "Bearer k"}, 200),
        ("/v1/models", {}, 401),
        ("/nowhere", {"authorization": "Bearer k"}, 404),
        ("/health", {"x": "y" * 70_000}, 431),
    ],
)
async def test_answers_and_errors_may_be_read(
    allowing: Server, path: str, headers: dict[str, str], status: int
) -> None:
    reply = await allowing.http.get(path, headers={"origin": PAGE, **headers})
    assert reply.status_code == status
    assert allowed(reply) == PAGE
    assert "x-request-id" in reply.headers["access-control-expose-headers"]
    assert "Origin" in reply.headers["vary"]


async def test_a_stream_may_be_read(allowing: Server) -> None:
    headers = {"origin": PAGE, "authorization": "Bearer k"}
    body = {"prompt": "a", "max_tokens": 2, "stream": True}
    reply = await allowing.post("/v1/completions", body, headers=headers)
    assert reply.text.endswith("data: [DONE]\n\n")
    assert allowed(reply) == PAGE


async def test_another_origin_is_refused_in_the_form_of_all_errors(allowing: Server) -> None:
    other = PREFLIGHT | {"origin": "https://evil.example"}
    reply = await allowing.http.options(CHAT, headers=other)
    assert reply.status_code == 400
    assert allowed(reply) is None
    assert reply.json()["error"] == {
        "message": "Disallowed CORS origin.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    read = await allowing.http.get("/health", headers={"origin": "https://evil.example"})
    assert (read.status_code, allowed(read)) == (200, None)


async def test_methods_and_headers_can_be_narrowed_and_credentials_allowed() -> None:
    rules = CrossOrigin(
        origins=("*",), methods=("GET",), headers=("authorization",), credentials=True
    )
    async with running(cross_origin=rules) as server:
        assert (await server.http.options(CHAT, headers=PREFLIGHT)).status_code == 400
        asked = PREFLIGHT | {"access-control-request-method": "GET"}
        reply = await server.http.options("/v1/models", headers=asked)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-credentials"] == "true"
        asked["access-control-request-headers"] = "x-other"
        assert (await server.http.options("/v1/models", headers=asked)).status_code == 400


async def test_every_origin_can_be_allowed() -> None:
    async with running(cross_origin=CrossOrigin(origins=("*",))) as server:
        assert allowed(await server.http.get("/live", headers={"origin": PAGE})) == "*"


async def test_without_an_origin_nothing_is_told(allowing: Server) -> None:
    assert allowed(await allowing.http.get("/health")) is None
