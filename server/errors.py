"""Every failure as OpenAI's error object. Exceptions are raised anywhere, translated here and
answered by the guard."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.protocol.validation import first_fault
from skipllm_core.errors import InvalidRequestError, OverloadedError, SkipLLMError

OVERLOADED = "The engine is currently overloaded, please try again later."
INTERNAL = "The server had an error while processing your request."

_MAX_MESSAGE_CHARS = 1024

logger = logging.getLogger(__name__)


class HTTPError(Exception):
    """A refusal with its status; what has no exception of the engine's own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}


class ClientDisconnectedError(Exception):
    """The client left; nobody reads an answer."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as the client sees it: a response of its own, or an event in a stream."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message[:_MAX_MESSAGE_CHARS],
                "type": "server_error" if self.status >= 500 else "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def reply_to(error: Exception) -> ErrorReply:
    """The answer to a failure. What is not known here is our fault, and says nothing of itself."""
    match error:
        case HTTPError():
            return ErrorReply(error.status, str(error), error.param, error.code, error.headers)
        case InvalidRequestError():
            return ErrorReply(400, str(error), error.param, error.code)
        case OverloadedError():
            headers = {"retry-after": str(math.ceil(error.retry_after_s))}
            return ErrorReply(503, OVERLOADED, code="overloaded", headers=headers)
        case _:
            return ErrorReply(500, INTERNAL)


def log_failure(error: Exception) -> None:
    """Tells the log about a fault of ours; what the engine reported has no traceback worth it."""
    if isinstance(error, SkipLLMError):
        if reply_to(error).status == 500:
            logger.error("a request failed: %s", error)
    elif reply_to(error).status == 500:
        logger.error("a request failed", exc_info=error)


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


async def on_routing_error(request: Request, error: Exception) -> NoReturn:
    """404 and 405 of the router, in OpenAI's words."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    message, code = error.detail, None
    if error.status_code == 404:
        message = f"Unknown request URL: {request.method} {path}. Please check the URL for typos."
        code = "unknown_url"
    if error.status_code == 405:
        message = f"Not allowed to {request.method} on {path}."
    raise HTTPError(error.status_code, message, code=code, headers=error.headers)


async def on_invalid_body(_: Request, error: Exception) -> NoReturn:
    assert isinstance(error, RequestValidationError)
    raise first_fault(error.errors())
