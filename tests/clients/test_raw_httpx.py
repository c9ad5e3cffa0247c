"""A client that reads its streams a byte at a time, with a parser as plain as the format."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
from openai._streaming import SSEDecoder

from tests.e2e.serving import Served

pytestmark = pytest.mark.slow

ASKED = [{"role": "user", "content": "What is the weather in San Francisco?"}]
FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": ASKED}),
    "chat with a tool": ("/v1/chat/completions", {"messages": ASKED, "tools": [TOOL]}),
    "completions": ("/v1/completions", {"prompt": "<|greet|>"}),
    "responses": ("/v1/responses", {"input": "Hello!"}),
    "responses with a tool": (
        "/v1/responses",
        {"input": "Hello!", "tools": [{"type": "function"} | FUNCTION]},
    ),
    "messages": ("/v1/messages", {"messages": ASKED, "max_tokens": 99}),
}


def split(data: Iterable[bytes]) -> Iterator[tuple[str | None, str]]:
    """The stream's events by the plainest reading of the format: one line `event:` at most, one
    line `data:`, an empty line."""
    line, event = b"", None
    for byte in data:
        assert len(byte) == 1
        if byte != b"\n":
            line += byte
            continue
        text, line = line.decode(), b""
        field, _, value = text.partition(": ")
        if field == "event":
            event = value
        elif field == "data":
            yield event, value
            event = None
        else:
            assert not text or text.startswith(":")
    assert line == b"", "the stream ends with a whole line"


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stream_read_byte_by_byte_gives_the_events_that_were_sent(
    scripted: Served, name: str
) -> None:
    path, body = REQUESTS[name]
    body = {"model": "scripted", "stream": True} | body
    with httpx.stream("POST", scripted.url + path, json=body, timeout=60) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        sent = list(reply.iter_raw(chunk_size=1))
    by_byte = list(split(sent))
    decoded = list(SSEDecoder().iter_bytes(iter([b"".join(sent)])))
    assert len(by_byte) > 3
    assert by_byte == [(event.event, event.data) for event in decoded]
    for event, data in by_byte:
        assert data == "[DONE]" or event == json.loads(data).get("type")
