"""Requests made of /openapi.json, by a library that nobody here wrote: whatever is sent, the answer
is documented, and no fault of the server."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.conftest import listening, make_profile, running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/responses/input_tokens"),
    ("POST", "/v1/responses/{response_id}/cancel"),
    ("GET", "/v1/responses/{response_id}"),
    ("GET", "/v1/responses/{response_id}/input_items"),
    ("DELETE", "/v1/responses/{response_id}"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_name}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/live"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/server_info"),
]
PLAIN: dict[str, Any] = {
    "prompt": "hi",
    "messages": [{"role": "user", "content": "hi"}],
    "tokens": [104, 105],
    "content": "hi",
    "input": "hi",
}
BODIES = [path for method, path in OPERATIONS if method == "POST" and "{" not in path]
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The application behind a real uvicorn, in a thread with a loop of its own."""
    started = threading.Event()
    found: dict[str, Any] = {}

    async def serve() -> None:
        async with running(skip_profile=make_profile()) as server, listening(server.app) as url:
            stop = asyncio.Event()
            found.update(url=url, stop=stop, loop=asyncio.get_running_loop())
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(30)
    yield found["url"]
    found["loop"].call_soon_threadsafe(found["stop"].set)
    thread.join(30)


@pytest.fixture(scope="module")
def schema(url: str) -> Any:
    document = httpx.get(f"{url}/openapi.json").json()
    known = {(m.upper(), path) for path, methods in document["paths"].items() for m in methods}
    assert known == set(OPERATIONS), "a route that is not tried here"
    return schemathesis.openapi.from_dict(document)


def thinned(body: dict[str, Any], num_options: int, *, is_plain: bool) -> dict[str, Any]:
    """The body with one subject and few options: all of them together contradict each other.
    `is_plain`: with a subject that is certainly good, so that the options come to be looked at."""
    subjects = [name for name in PLAIN if body.get(name)]
    options = {name: body[name] for name in body if name not in PLAIN}
    kept = {name: options.pop(name) for name in ("max_tokens",) if name in options}  # some need it
    kept |= dict(list(options.items())[:num_options])
    return {name: PLAIN[name] if is_plain else body[name] for name in subjects[:1]} | kept


def check(url: str, schema: Any, method: str, path: str, mode: GenerationMode, num: int) -> None:
    @settings(
        max_examples=num,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(schema[path][method].as_strategy(generation_mode=mode), st.integers(0, 4), st.booleans())
    def try_one(case: Case, num_options: int, is_plain: bool) -> None:
        if mode is POSITIVE and isinstance(case.body, dict):
            case.body = thinned(case.body, num_options, is_plain=is_plain)
        reply = case.call_and_validate(base_url=url, checks=CHECKS, timeout=30)
        statuses[reply.status_code] += 1

    statuses: Counter[int] = Counter()
    try_one()
    is_answered = mode is POSITIVE and "{" not in path
    assert (statuses[200] > 0) is is_answered, statuses


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_keeps_to_the_description_is_answered_as_described(
    url: str, schema: Any, method: str, path: str
) -> None:
    check(url, schema, method, path, POSITIVE, 20 if method == "POST" else 2)


@pytest.mark.parametrize("path", BODIES)
def test_what_does_not_is_refused_as_described(url: str, schema: Any, path: str) -> None:
    check(url, schema, "POST", path, NEGATIVE, 20)


@pytest.mark.slow
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE])
def test_many_requests_are_answered_as_described(
    url: str, schema: Any, path: str, mode: GenerationMode
) -> None:
    check(url, schema, "POST", path, mode, 60)
