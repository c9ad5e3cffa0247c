"""First in the stack, on bare ASGI: keys, limits, request ids, and the last word on failures."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from starlette._utils import get_route_path
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.error_forms import error_response, is_anthropics
from server.errors import ClientDisconnectedError, HTTPError, log_failure, reply_to
from server.metrics import Endpoint, Metrics

# Answered without a key: what probes and browsers ask, who send none. Everything else is denied.
PUBLIC_PATHS = frozenset(
    {
        "/health", "/ready", "/live",
        "/docs", "/docs/docs.js", "/docs/favicon.png",  # fixed files; /openapi.json wants a key
        "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css",
    }
)  # fmt: skip
CLIENT_LEFT = 499  # as nginx calls it; no client sees it, the metrics do

_MEASURED: dict[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/messages": "messages",
    "/v1/responses": "responses",
}
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_CLOSE = {"connection": "close"}  # the rest of the request is not worth reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may be; uvicorn itself has no such limits."""

    url_bytes: int = 8192
    header_bytes: int = 65_536
    num_headers: int = 100
    body_bytes: int = 8 * 2**20
    body_timeout_s: float = 30.0  # for the whole body


class Guard:
    """ASGI middleware that lets only bounded, authorised requests through.

    The body has been read when the application starts, so `receive` then only tells that the
    client has left. Leaves the request's recorder in `state.recorder`, where it is measured, and
    its id in `state.request_id`.
    """

    def __init__(
        self, app: ASGIApp, *, api_keys: Iterable[str], limits: Limits, metrics: Metrics
    ) -> None:
        self._app = app
        self._key_digests = [_digest(key.encode()) for key in api_keys]
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _first_values(scope)
        request_id = _request_id(headers)
        path = get_route_path(scope)  # as the router sees it
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer_headers = MutableHeaders(scope=message)
                answer_headers["x-request-id"] = request_id
                if is_anthropics(path):
                    answer_headers["request-id"] = request_id  # where Anthropic's client looks
            await send(message)

        endpoint = _MEASURED.get(path)
        recorder = None if endpoint is None else self._metrics.request(endpoint, request_id)
        state = scope.setdefault("state", {})
        state["recorder"] = recorder
        state["request_id"] = request_id
        try:
            self._check_key(path, headers)
            self._check_size(scope)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = await self._read_body(headers, receive)
            await self._app(scope, receive, send_with_id)
        except ClientDisconnectedError:
            pass
        except Exception as error:
            log_failure(error)
            if status is None:
                reply = reply_to(error)
                if recorder is not None:
                    recorder.finished(reply.status, error=reply.message)
                response = error_response(reply, path, request_id)
                await response(scope, receive, send_with_id)
            # Else the stream just ends, and the server closes the connection.
        finally:
            if recorder is not None:
                recorder.finished(status or CLIENT_LEFT)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._key_digests or path in PUBLIC_PATHS:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = [key] if scheme.lower() == b"bearer" else []
        given += [headers[b"x-api-key"]] if b"x-api-key" in headers else []
        pairs = itertools.product(map(_digest, given), self._key_digests)
        matches = [hmac.compare_digest(digest, known) for digest, known in pairs]
        if not any(matches):
            raise HTTPError(
                401,
                "Incorrect API key provided",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_size(self, scope: Scope) -> None:
        limits = self._limits
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > limits.url_bytes:
            raise HTTPError(414, "The URL is too long.", headers=_CLOSE)
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > limits.num_headers or size > limits.header_bytes:
            raise HTTPError(431, "The request headers are too large.", headers=_CLOSE)

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """The whole body, as a `receive` that gives it once and then waits for a disconnect."""
        limit = self._limits.body_bytes
        too_large = HTTPError(
            413, f"The request body is larger than {limit} bytes.", headers=_CLOSE
        )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 19 or int(length) > limit:
            raise too_large
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise HTTPError(415, "Compressed request bodies are not supported.", headers=_CLOSE)
        media_type = headers.get(b"content-type", b"application/json").partition(b";")[0]
        if media_type.strip().lower() != b"application/json":
            raise HTTPError(415, "The content type must be application/json.", headers=_CLOSE)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                is_whole = False
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnectedError
                    body += message.get("body", b"")
                    is_whole = not message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise HTTPError(408, "The request body took too long.", headers=_CLOSE) from None
        unread = [bytes(body)]

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        return replay


def _first_values(scope: Scope) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.lower(), value)
    return headers


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own id if it is harmless, else a new one."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
