"""Server-sent events, as OpenAI's clients read them: one line of JSON, a blank line."""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.background import BackgroundTask

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: clients pass over it, proxies see life

_PING_S = 15.0
_SEND_TIMEOUT_S = 30.0  # a client that does not read for so long loses its place in the batch


def event(content: object) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def named_event(name: str, content: object) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(content)


def event_stream(events: AsyncIterator[bytes], background: BackgroundTask) -> EventSourceResponse:
    return EventSourceResponse(
        events,
        headers={"cache-control": "no-cache"},
        background=background,
        ping=_PING_S,
        ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        sep="\n",
        send_timeout=_SEND_TIMEOUT_S,
    )


def leave_draining_to_us() -> None:
    """sse-starlette would cut every stream 0.2 s after SIGTERM; `Lifecycle` lets them finish."""
    AppStatus.enable_automatic_graceful_drain = False
