"""Whose error object a path answers with: Anthropic's on its paths, OpenAI's on all others."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from server.errors import ErrorReply, json_response

# By status. Overload is 503 here as on every path, not Anthropic's own 529: proxies and balancers
# know 503, and its client takes both for the same: try again after Retry-After.
_ANTHROPICS_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropics_body(reply: ErrorReply, request_id: str) -> dict[str, Any]:
    """It has no place for the parameter but the message."""
    kind = "api_error" if reply.status >= 500 else "invalid_request_error"
    message = reply.body["error"]["message"]
    if reply.param is not None and reply.param not in message:
        message = f"{reply.param}: {message}"
    error = {"type": _ANTHROPICS_TYPES.get(reply.status, kind), "message": message}
    return {"type": "error", "error": error, "request_id": request_id}


def is_anthropics(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def error_response(reply: ErrorReply, path: str, request_id: str) -> Response:
    body = anthropics_body(reply, request_id) if is_anthropics(path) else reply.body
    return json_response(body, reply.status, reply.headers)
