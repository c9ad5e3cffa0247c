"""What is refused before the application sees it: keys, sizes, slow bodies, odd ids."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.routing import APIRoute

from server.guard import PUBLIC_PATHS, Limits
from tests.server.conftest import Server, running

KEY = "sk-sesame"
BODY = b'{"prompt": "a", "max_tokens": 1}'
JSON = {"content-type": "application/json"}


@pytest.fixture
async def locked() -> AsyncIterator[Server]:
    async with running(api_keys=[KEY, "other"], limits=Limits(body_bytes=1000)) as server:
        yield server


def routes(server: Server) -> list[tuple[str, str]]:
    """(method, path) of everything that the application answers, its documentation included."""
    return [
        (method, route.path.replace("{model_name:path}", "x"))
        for route in _flat(server.app.routes)
        for method in route.methods or ()
    ]


def _flat(found: list[Any]) -> list[Any]:
    flat = []
    for route in found:
        inner = getattr(route, "routes", None) or getattr(
            getattr(route, "original_router", None), "routes", None
        )
        flat += _flat(inner) if inner else [route]
    return flat


async def test_every_route_but_the_probes_wants_a_key(locked: Server) -> None:
    known = routes(locked)
    assert ("POST", "/v1/chat/completions") in known
    assert ("GET", "/openapi.json") in known
    assert any(isinstance(route, APIRoute) for route in _flat(locked.app.routes))
    for method, path in [*known, ("GET", "/nowhere"), ("GET", "//health")]:
        reply = await locked.http.request(method, path)
        if path in PUBLIC_PATHS:
            assert reply.status_code == 200
            continue
        assert reply.status_code == 401, (method, path)
        if path.startswith("/v1/messages"):
            assert reply.json()["error"]["type"] == "authentication_error"
        elif method != "HEAD":
            assert reply.json()["error"] == {
                "message": "Incorrect API key provided",
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_api_key",
            }


@pytest.mark.parametrize(
    "value",
    [
        b"", b"Bearer", b"Bearer ", KEY.encode(), b"Basic " + KEY.encode(),
        b"Bearer " + KEY.encode() + b" ", b"Bearer  " + KEY.encode(), b"Bearer sk-sesam",
        "Bearer schlüssel".encode(), b"Bearer \xff\xfe", b"Bearer " + b"x" * 2**20,
    ],
    ids=lambda value: repr(value[:24]),
)  # fmt: skip
async def test_a_key_that_is_not_exactly_one_of_ours_is_401(locked: Server, value: bytes) -> None:
    reply = await locked.http.get("/v1/models", headers={b"authorization": value})
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", [KEY, "other"])
async def test_each_of_the_keys_opens(locked: Server, key: str) -> None:
    headers = {"authorization": f"bearer {key}"}
    assert (await locked.http.get("/v1/models", headers=headers)).status_code == 200


@pytest.fixture
async def small() -> AsyncIterator[Server]:
    limits = Limits(body_bytes=1000, body_timeout_s=0.2, header_bytes=4000, url_bytes=500)
    async with running(limits=limits) as server:
        yield server


async def test_a_body_one_byte_over_the_limit_is_413(small: Server) -> None:
    async def chunks(size: int) -> AsyncIterator[bytes]:
        for i in range(size):
            yield BODY[i : i + 1] or b" "

    for size, status in ((1000, 200), (1001, 413)):
        known = await small.http.post("/v1/completions", content=BODY.ljust(size), headers=JSON)
        unknown = await small.http.post("/v1/completions", content=chunks(size), headers=JSON)
        assert (known.status_code, unknown.status_code) == (status, status)


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "9" * 30])
async def test_an_odd_content_length_is_413(small: Server, length: str) -> None:
    reply = await small.http.post(
        "/v1/completions", content=BODY, headers=JSON | {"content-length": length}
    )
    assert reply.status_code == 413


async def test_a_body_that_trickles_is_408(small: Server) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    reply = await small.http.post("/v1/completions", content=trickle(), headers=JSON)
    assert reply.status_code == 408
    assert reply.headers["connection"] == "close"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        JSON | {"content-encoding": "gzip"},
    ],
)
async def test_other_media_and_compression_are_415(small: Server, headers: dict[str, str]) -> None:
    reply = await small.http.post("/v1/completions", content=gzip.compress(BODY), headers=headers)
    assert reply.status_code == 415
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON"])
async def test_json_may_be_spelled_in_any_way(small: Server, content_type: str) -> None:
    headers = {"content-type": content_type}
    reply = await small.http.post("/v1/completions", content=BODY, headers=headers)
    assert reply.status_code == 200


async def test_too_much_header_or_url_is_refused(small: Server) -> None:
    many = {f"x-{i}": "1" for i in range(101)}
    assert (await small.http.get("/health", headers=many)).status_code == 431
    assert (await small.http.get("/health", headers={"x": "y" * 4000})).status_code == 431
    assert (await small.http.get("/health?" + "q" * 500)).status_code == 414


@pytest.mark.parametrize("sent", ["req-1.A_b", "0" * 128])
async def test_a_harmless_request_id_comes_back(small: Server, sent: str) -> None:
    reply = await small.http.get("/nowhere", headers={"x-request-id": sent})
    assert reply.headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["", "a b", "é", "x" * 129, "a\\r\\nset-cookie: b", "<script>"])
async def test_an_odd_request_id_is_replaced(small: Server, sent: str) -> None:
    reply = await small.http.get("/health", headers={b"x-request-id": sent.encode()})
    assert reply.headers["x-request-id"].isalnum()


async def test_unknown_urls_and_wrong_methods_have_openais_form(small: Server) -> None:
    missing = await small.http.get("/v1/nowhere")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "unknown_url"
    wrong = await small.http.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    for reply in (missing, wrong):
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert reply.headers["x-request-id"]
