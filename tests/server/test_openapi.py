"""/openapi.json: nothing undocumented, and nothing documented that is not so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from server.guard import PUBLIC_PATHS
from server.protocol.schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Error,
    Health,
    ModelCard,
    ModelList,
    ServerInfo,
    Status,
    Version,
)
from tests.server.conftest import MODEL, Server, running
from tests.server.test_answers import events

Operation = tuple[str, str, dict[str, Any]]


@pytest.fixture
async def document(server: Server) -> Any:
    reply = await server.http.get("/openapi.json")
    assert reply.status_code == 200
    return reply.json()


def operations(document: Any) -> Iterator[Operation]:
    for path, found in document["paths"].items():
        for method, operation in found.items():
            yield path, method, operation


def is_sentence(text: str) -> bool:
    return text[:1].isupper() and text.rstrip().endswith(".")


def test_every_route_is_told_in_a_sentence(document: Any) -> None:
    told = {path: operation.get("description", "") for path, _, operation in operations(document)}
    assert {"/v1/chat/completions", "/v1/models/{model_name}", "/health"} <= set(told)
    assert [path for path, text in told.items() if not is_sentence(text)] == []


def test_every_field_of_a_request_is_told_in_a_sentence(document: Any) -> None:
    schemas = document["components"]["schemas"]

    def named(schema: Any) -> Iterator[str]:
        if isinstance(schema, dict):
            if "$ref" in schema:
                yield schema["$ref"].rpartition("/")[2]
            schema = list(schema.values())
        if isinstance(schema, list):
            for part in schema:
                yield from named(part)

    bodies = {
        name
        for _, _, operation in operations(document)
        for name in named(operation.get("requestBody", {}))
    }
    while new := {name for body in bodies for name in named(schemas[body])} - bodies:
        bodies |= new
    assert {"ChatRequest", "CompletionRequest", "SkipWish", "ChatMessage"} <= bodies
    mute = [
        f"{body}.{field}"
        for body in sorted(bodies)
        for field, schema in schemas[body].get("properties", {}).items()
        if not is_sentence(schema.get("description", ""))
    ]
    assert mute == []


def test_errors_are_documented_and_422_is_none_of_them(document: Any) -> None:
    for path, method, operation in operations(document):
        model = "MessagesError" if path.startswith("/v1/messages") else "Error"
        error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model}"}}}
        responses = operation["responses"]
        assert "422" not in responses
        expected = {"414", "431", "500"} | ({"401"} if path not in PUBLIC_PATHS else set())
        if method == "post":
            expected |= {"400", "404", "408", "413", "415", "429", "503"}
        assert expected <= set(responses), path
        assert all("x-request-id" in response["headers"] for response in responses.values())
        for status in expected:
            assert responses[status]["content"] == error, (path, status)
    schemas = document["components"]["schemas"]
    assert set(schemas["ErrorObject"]["required"]) == {"message", "type", "param", "code"}
    assert "HTTPValidationError" not in schemas


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_is_documented_whole_and_as_events(document: Any, path: str) -> None:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    whole = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    data = content["text/event-stream"]["itemSchema"]["properties"]["data"]
    chunk = data["contentSchema"]["$ref"].rpartition("/")[2]
    assert {whole, chunk} <= set(document["components"]["schemas"])
    assert chunk == whole + "Chunk"


async def test_a_key_is_a_bearer_token_or_an_x_api_key_and_probes_need_none() -> None:
    async with running(api_keys=["k"]) as server:
        headers = {"authorization": "Bearer k"}
        document = (await server.http.get("/openapi.json", headers=headers)).json()
    schemes = document["components"]["securitySchemes"]
    assert [scheme.get("scheme") or scheme["name"] for scheme in schemes.values()] == [
        "bearer",
        "x-api-key",
    ]
    for path, _, operation in operations(document):
        expected = None if path in PUBLIC_PATHS else [{name: []} for name in schemes]
        assert operation.get("security") == expected


def test_without_keys_a_key_is_welcome_and_not_needed(document: Any) -> None:
    assert {} in document["paths"]["/v1/models"]["get"]["security"]


EVERYTHING: dict[str, Any] = {
    "n": 2,
    "max_tokens": 5,
    "return_token_ids": True,
    "stop": "zz",
    "skip": {"ratio": 0.2, "warmup_tokens": 2, "trace": True},
}


@pytest.mark.parametrize("body", [{}, EVERYTHING], ids=["plain", "everything"])
async def test_answers_and_chunks_are_as_documented_key_by_key(
    server: Server, body: dict[str, Any]
) -> None:
    chat = {"logprobs": True, "top_logprobs": 2, **body} if body else {}
    text = {"logprobs": 2, "echo": False, **body} if body else {}
    usage = {"include_usage": True, "continuous_usage_stats": True}
    ChatCompletion.model_validate_json((await server.chat(**chat)).content)
    Completion.model_validate_json((await server.complete(**text)).content)
    options: dict[str, Any] = {"stream": True, "stream_options": usage if body else None}
    for chunk in events((await server.chat(**chat, **options)).text):
        ChatCompletionChunk.model_validate(chunk)
    for chunk in events((await server.complete(**text, **options)).text):
        CompletionChunk.model_validate(chunk)


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/models", ModelList),
        (f"/v1/models/{MODEL}", ModelCard),
        ("/health", Health),
        ("/ready", Status),
        ("/live", Status),
        ("/version", Version),
        ("/server_info", ServerInfo),
        ("/v1/models/other", Error),
        ("/nowhere", Error),
    ],
)
async def test_what_is_read_is_as_documented(
    server: Server, path: str, model: type[BaseModel]
) -> None:
    model.model_validate_json((await server.http.get(path)).content)
