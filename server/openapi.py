"""/openapi.json: what every route answers, the errors included, and how a key is sent.

A route says what is its own with `**answers(...)`; what the guard may answer before any route is
reached, and what every body may be refused for, is added here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response

from server.protocol.schemas import Error

# The security schemes' names: OpenAI's way to send a key, and Anthropic's.
SCHEME, SECOND_SCHEME = "key", "x-api-key"

_ERRORS = {
    400: "The request is malformed, contradicts itself, or asks for what is not supported.",
    401: "There is no key, or a wrong one.",
    404: "There is no such thing under this name.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    414: "The URL is too long.",
    415: "The body is compressed, or its content type is not application/json.",
    429: "Too many requests: not from this server itself, which answers 503 when it is full, but "
    "from gateways that limit each key.",
    431: "The headers are too many or too large.",
    500: "A fault of the server.",
    503: "The model is being loaded, the queue is full, or the server is shutting down.",
}
_OF_ALL = (414, 431, 500)
_OF_BODIES = (400, 404, 408, 413, 415, 429, 503)
_REQUEST_ID = {"description": "The request's id, as the log has it.", "schema": {"type": "string"}}
_SECONDS = {"description": "Seconds to wait before the next try.", "schema": {"type": "integer"}}
_DESCRIPTION = (
    "An OpenAI-compatible server whose decode steps skip feed-forward blocks. Every error is "
    "OpenAI's error object, on unknown URLs (404) and wrong methods (405), too; below /v1/messages "
    "it is Anthropic's. HEAD is answered "
    "wherever GET is; a trailing slash changes nothing."
)
_REFS = "#/components/schemas/{model}"


def answers(
    answer: type[BaseModel] | None,
    *,
    stream: type[BaseModel] | None = None,
    red: type[BaseModel] | None = None,
    errors: Iterable[int] = (),
    error: type[BaseModel] = Error,
    media_type: str = "application/json",
) -> dict[str, Any]:
    """What a route answers, as arguments of its decorator.

    `answer` is the whole one (None: text of `media_type`), `stream` the JSON of an event's data,
    `red` a probe's body of 503, `error` the error object. `errors` are statuses of the route's own;
    those of every route, and of every route that takes a body, need not be named.
    """
    content: dict[str, Any] = {}
    if answer is None:
        content[media_type] = {"schema": {"type": "string"}}
    if stream is not None:
        content["text/event-stream"] = {"itemSchema": _event(stream)}
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": "The answer.", "content": content},
        500: {"description": _ERRORS[500], "model": error},
    }
    if answer is not None:
        responses[200]["model"] = answer
    for status in errors:
        responses[status] = {"description": _ERRORS[status], "model": error}
    if red is not None:
        responses[503] = {"description": "Not now.", "model": red}
    return {"responses": responses, "response_class": Response}


def describe(app: FastAPI, *, public_paths: Collection[str], needs_key: bool) -> None:
    """Makes `app.openapi()` tell the truth about all of its routes."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, public_paths, needs_key=needs_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI says to extend it


def _document(app: FastAPI, public_paths: Collection[str], *, needs_key: bool) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # of the 422 that is never sent
        schemas.pop(name, None)
    scheme = {"type": "http", "scheme": "bearer", "description": "One of the keys of --api-key."}
    second = {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."}
    components["securitySchemes"] = {SCHEME: scheme, SECOND_SCHEME: second}
    for path, operations in document["paths"].items():
        is_public = path in public_paths
        for method, operation in operations.items():
            responses = operation["responses"]
            responses.pop("422", None)
            of_error = responses["500"]["content"]
            statuses = [*_OF_ALL, *(_OF_BODIES if method == "post" else ())]
            if not is_public:
                statuses.append(401)
                # Without keys every request may pass, one that bears a key as well.
                schemes: list[dict[str, Any]] = [{SCHEME: []}, {SECOND_SCHEME: []}]
                operation["security"] = schemes if needs_key else [{}, *schemes]
            for status in statuses:
                reply = {"description": _ERRORS[status], "content": of_error}
                responses.setdefault(str(status), reply)
            operation["responses"] = dict(sorted(responses.items()))
            for status, response in responses.items():
                _describe_headers(status, response)
                _hoist(response, schemas)
    components["schemas"] = dict(sorted(schemas.items()))
    return document


def _describe_headers(status: str, response: dict[str, Any]) -> None:
    headers = {"x-request-id": _REQUEST_ID}
    if status == "503" and response["description"] == _ERRORS[503]:
        headers["retry-after"] = _SECONDS
    response["headers"] = headers


def _event(data: type[BaseModel]) -> dict[str, Any]:
    """A server-sent event whose data is JSON. The schemas that it names are hoisted later."""
    return {
        "type": "object",
        "description": "An event's `data` is one line of JSON, or at the end of OpenAI's older "
        "streams `[DONE]`; after a failure it is an error object, and the last. Lines that begin "
        "with a colon are comments that keep the connection alive.",
        "required": ["data"],
        "properties": {
            "event": {"type": "string"},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": data.model_json_schema(ref_template=_REFS),
            },
        },
    }


def _hoist(response: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Moves an event's schema, and those that it names, to where the others are."""
    events = response.get("content", {}).get("text/event-stream")
    if events is None:
        return
    data = events["itemSchema"]["properties"]["data"]
    schema = data["contentSchema"]
    if "$ref" in schema and "$defs" not in schema:
        return
    schemas.update(schema.pop("$defs", {}))
    if "$ref" not in schema:
        schemas[schema["title"]] = schema
        data["contentSchema"] = {"$ref": _REFS.format(model=schema["title"])}
