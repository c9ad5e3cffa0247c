"""POST /v1/messages in Anthropic's form, and through Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import orjson
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from pydantic import BaseModel, TypeAdapter

from server.guard import Limits
from server.messages.form import Blocks
from server.parts import ToolCallBegin
from server.protocol.schemas_messages import MessageEvent, MessageObject, MessagesError
from tests.server.conftest import MODEL, Server, listening, make_profile, running
from tests.server.test_answers import sing
from tests.server.test_responses import parts_of, pieces, says

USER = {"role": "user", "content": "hi"}
STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, held against Anthropic's types and our own description."""
    *blocks, last = text.split("\n\n")
    assert last == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        MessageEvent.model_validate(event)
        if event["type"] not in ("ping", "error"):  # which its client keeps to itself
            STREAM_EVENT.validate_python(event)
        found.append(event)
    return found


async def send(server: Server, given: Any = "hi", **body: Any) -> dict[str, Any]:
    messages = given if isinstance(given, list) else [{"role": "user", "content": given}]
    reply = await server.post("/v1/messages", {"messages": messages, "max_tokens": 20, **body})
    assert reply.status_code == 200, reply.text
    message: dict[str, Any] = reply.json()
    Message.model_validate(message)
    MessageObject.model_validate(message)
    return message


async def stream(server: Server, **body: Any) -> list[dict[str, Any]]:
    request = {"messages": [USER], "max_tokens": 20, "stream": True, **body}
    reply = await server.post("/v1/messages", request)
    assert reply.headers["content-type"].startswith("text/event-stream")
    return events(reply.text)


async def prompt_of(server: Server, *messages: Any, **chat: Any) -> list[int]:
    """What the model is given for a chat of these messages, as role and content."""
    wire = [{"role": role, "content": content} for role, content in messages]
    body = {"messages": wire, "max_tokens": 1, **chat}
    reply = await server.post("/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    return last_prompt(server)


def last_prompt(server: Server) -> list[int]:
    seq = server.runner.batches[-1].rows[0].seq
    return seq.token_ids[: seq.num_prompt_tokens]


# Answers -----------------------------------------------------------------------------------------


async def test_an_answer_has_anthropics_form() -> None:
    async with running(says("Hello."), skip_profile=make_profile()) as server:
        message = await send(server, skip={"ratio": 0.25}, metadata={"user_id": "u"})
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", MODEL)
    assert message["content"] == [{"type": "text", "text": "Hello."}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    usage = message["usage"]
    assert (usage["output_tokens"], usage["cache_read_input_tokens"]) == (7, 0)
    assert usage["skip"]["skipped_ffn_blocks"] > 0


async def test_cached_tokens_are_not_among_the_input_tokens(server: Server) -> None:
    first = (await send(server, "x" * 40))["usage"]
    again = (await send(server, "x" * 40))["usage"]
    assert first["cache_read_input_tokens"] == 0 < again["cache_read_input_tokens"]
    total = again["input_tokens"] + again["cache_read_input_tokens"]
    assert total == first["input_tokens"]


async def test_what_ended_an_answer_is_told(server: Server) -> None:
    assert (await send(server, max_tokens=3))["stop_reason"] == "max_tokens"
    stopped = await send(server, stop_sequences=["&", "%&"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "%&")
    assert stopped["content"][0]["text"].endswith("$")
    end = (await stream(server, stop_sequences=["&"]))[-2]
    assert end["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "&"}


async def test_an_answer_of_nothing_is_a_block_of_no_text() -> None:
    async with running(says("")) as server:
        assert (await send(server))["content"] == [{"type": "text", "text": ""}]
        kinds = [event["type"] for event in await stream(server)]
    assert kinds[2:4] == ["content_block_start", "content_block_stop"]


async def test_a_stream_tells_every_step() -> None:
    async with running(sing) as server:
        whole = await send(server)
        told = await stream(server)
    kinds = [event["type"] for event in told]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start, end = told[0]["message"], told[-2]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == (
        [],
        None,
        0,
    )
    text = "".join(event["delta"]["text"] for event in told[3:-3])
    assert text == whole["content"][0]["text"]
    assert end["delta"]["stop_reason"] == whole["stop_reason"]
    assert end["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert "skip" in end["usage"]


async def test_a_trace_tells_the_layers_skipped(server: Server) -> None:
    wish = {"ratio": 0.25, "trace": True}
    skip = (await send(server, max_tokens=4, skip=wish))["skip"]
    assert [len(layers) for layers in skip["skipped_layers"]] == [0, 0, 1, 1]
    assert (await stream(server, max_tokens=4, skip=wish))[-2]["skip"] == skip


async def test_a_trace_tells_the_neurons_left_out(server: Server) -> None:
    wish = {"policy": "neurons", "ratio": 0.25, "trace": True}
    message = await send(server, max_tokens=4, skip=wish)
    assert [len(layers) for layers in message["skip"]["skipped_neurons"]] == [0, 0, 4, 4]
    assert message["usage"]["skip"]["skipped_ffn_share"] > 0
    assert (await stream(server, max_tokens=4, skip=wish))[-2]["skip"] == message["skip"]


# What is asked -----------------------------------------------------------------------------------


async def test_blocks_become_the_chats_messages(server: Server) -> None:
    text = {"type": "text", "text": "A"}
    messages = [
        {"role": "user", "content": [text, {"type": "text", "text": "B"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "T", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            text,
        ]},
        {"role": "user", "content": "C"},
        {"role": "user", "content": "D"},
    ]  # fmt: skip
    system = [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}]
    await send(server, messages, system=system, max_tokens=1)
    given = last_prompt(server)
    chat = [("system", "S"), ("user", "A\nB"), ("assistant", "A"), ("user", "C\nD")]
    assert given == await prompt_of(server, *chat)


async def test_an_answer_that_has_begun_is_continued(server: Server) -> None:
    messages = [USER, {"role": "assistant", "content": "abc"}]
    message = await send(server, messages, max_tokens=3)
    assert message["content"][0]["text"] == "def"
    given = last_prompt(server)
    chat = [("user", "hi"), ("assistant", "abc")]
    assert given == await prompt_of(
        server, *chat, continue_final_message=True, add_generation_prompt=False
    )


async def test_parameters_reach_the_engine(server: Server) -> None:
    await send(server, max_tokens=3, temperature=0.5, top_p=0.5, top_k=7, seed=11, min_p=0.1)
    params = server.runner.batches[-1].rows[0].seq.params
    assert (params.max_tokens, params.temperature, params.top_p) == (3, 0.5, 0.5)
    assert (params.top_k, params.seed, params.min_p) == (7, 11, 0.1)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [USER] * 2049}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "boss", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}
            ]}]},
            "messages[0].content[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result"}]}, USER]},
            "messages[0].content[0].type",
        ),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_format": {"type": "json_schema", "schema": {"not": {}}}}, "output_format.schema"),
        ({"skip": {"ratio": 2}}, "skip.ratio"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management",
        ),
        ({"stop": ["x"]}, "stop"),
        ({"n": 2}, "n"),
        ({"seed": "x"}, "seed"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_told_in_the_requests_own_names(
    server: Server, body: dict[str, Any], place: str
) -> None:
    reply = await server.post("/v1/messages", {"messages": [USER], "max_tokens": 3, **body})
    assert reply.status_code == 400
    error = MessagesError.model_validate(reply.json())
    assert error.error.type == "invalid_request_error"
    assert f"'{place}'" in error.error.message or error.error.message.startswith(f"{place}:")
    assert error.request_id == reply.headers["request-id"] == reply.headers["x-request-id"]


async def test_tokens_are_counted_as_they_are_used(server: Server) -> None:
    body = {"messages": [USER], "system": "be brief"}
    counted = (await server.post("/v1/messages/count_tokens", body)).json()
    message = await send(server, [USER], system="be brief")
    assert counted == {"input_tokens": message["usage"]["input_tokens"]}


async def test_fields_that_ask_for_nothing_are_taken(server: Server) -> None:
    await send(
        server,
        cache_control={"type": "ephemeral"},
        container=None,
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        mcp_servers=[],
        metadata={"user_id": "u"},
        service_tier="auto",
        thinking={"type": "enabled", "budget_tokens": 1024},
        tools=None,
    )


# Errors ------------------------------------------------------------------------------------------


async def test_every_failure_on_its_paths_is_anthropics_error() -> None:
    async with running(api_keys=["k"], limits=Limits(body_bytes=1000)) as server:
        body = {"messages": [USER], "max_tokens": 3}
        found = {}
        for name, key, path, more in [
            ("key", "x", "/v1/messages", {}),
            ("url", "k", "/v1/messages/batches", {}),
            ("model", "k", "/v1/messages", {"model": "x"}),
            ("size", "k", "/v1/messages", {"system": "x" * 1000}),
            ("room", "k", "/v1/messages/count_tokens", {"system": "x" * 300}),
        ]:
            headers = {"x-api-key": key}
            reply = await server.post(path, {**body, **more}, headers=headers)
            error = MessagesError.model_validate(reply.json()).error
            found[name] = (reply.status_code, error.type)
        method = await server.http.get("/v1/messages", headers={"x-api-key": "k"})
        text = await server.http.post(
            "/v1/messages", content=b"{", headers={"x-api-key": "k", "content-type": "text/plain"}
        )
        await server.engine.close()
        down = await server.post("/v1/messages", body, headers={"x-api-key": "k"})
    assert found == {
        "key": (401, "authentication_error"),
        "url": (404, "not_found_error"),
        "model": (404, "not_found_error"),
        "size": (413, "request_too_large"),
        "room": (400, "invalid_request_error"),
    }
    assert (method.status_code, text.status_code, down.status_code) == (405, 415, 503)
    for reply in (method, text):
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert down.json()["error"]["type"] == "overloaded_error"
    assert down.headers["retry-after"]


async def test_errors_are_anthropics_below_a_prefix_too() -> None:
    async with running(root_path="/llm") as server:
        for path in ("/llm/v1/messages/", "/v1/messages/", "/llm/v1/messages/nowhere"):
            reply = await server.http.get(path)
            MessagesError.model_validate(reply.json())
            assert reply.headers["request-id"]
        assert "type" not in (await server.http.get("/llm/v1/messages_of_all")).json()


async def test_a_prompt_without_room_is_told_in_anthropics_words(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 120}], "max_tokens": 3}
    reply = await server.post("/v1/messages", body)
    message = reply.json()["error"]["message"]
    assert message == "prompt is too long: 139 tokens > 128 maximum"


async def test_a_key_may_be_an_x_api_key_on_every_path() -> None:
    async with running(api_keys=["k"]) as server:
        found = [
            (await server.http.get("/v1/models", headers=headers)).status_code
            for headers in (
                {"x-api-key": "k"},
                {"x-api-key": "k", "authorization": "Bearer x"},
                {"x-api-key": "x", "authorization": "Bearer k"},
                {"x-api-key": "x"},
                {"x-api-key": ""},
                {"x-api-key": "Bearer k"},
            )
        ]
    assert found == [200, 200, 200, 401, 401, 401]


# Parts become blocks -----------------------------------------------------------------------------


@given(pieces)
def test_what_the_events_tell_joins_to_the_blocks(found: list[Any]) -> None:
    parts = parts_of(found)
    blocks = Blocks()
    told = [*blocks.add(parts), *blocks.finish()]
    begun: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in told:
        STREAM_EVENT.validate_python(event)
        assert event["index"] == len(begun) - (event["type"] != "content_block_start")
        match event["type"]:
            case "content_block_start":
                begun.append(event["content_block"])
                texts.append("")
            case "content_block_delta":
                delta = event["delta"]
                texts[-1] += next(
                    (delta[key] for key in ("text", "thinking", "partial_json") if key in delta), ""
                )
    assert [event["type"] for event in told].count("content_block_stop") == len(begun)
    assert [block["type"] for block in blocks.content] == [block["type"] for block in begun]
    for block, text in zip(blocks.content, texts, strict=True):
        if block["type"] != "tool_use":
            assert block[block["type"]] == text
    calls = [(b["id"], b["name"]) for b in blocks.content if b["type"] == "tool_use"]
    assert calls == [(part.id, part.name) for part in parts if isinstance(part, ToolCallBegin)]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"a": 1e2, "b": 12345678901234567890123}', '{"a": 1e2, "b": 12345678901234567890123}'),
        ("", "{}"),
        ('{"a": ', "{}"),
        ("[1]", "{}"),
        ("7", "{}"),
    ],
)
def test_arguments_are_an_object_in_the_models_own_text(arguments: str, shown: str) -> None:
    blocks = Blocks()
    list(blocks.add(parts_of([("f", [arguments[:3], arguments[3:]])])))
    list(blocks.finish())
    assert orjson.dumps(blocks.content[0]["input"]).decode() == shown


# Anthropic's own client --------------------------------------------------------------------------


@pytest.fixture
async def client(server: Server) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with (
        listening(server.app) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_anthropics_client_sends_streaming_and_not(
    client: anthropic.AsyncAnthropic,
) -> None:
    request: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": [USER]}
    whole = await client.messages.create(**request, extra_body={"skip": {"ratio": 0.25}})
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.model_extra is not None
    assert whole.usage.model_extra["skip"]["token_skip_ratio"] > 0
    (block,) = whole.content
    assert block.type == "text"
    async with client.messages.stream(**request) as streamed:
        text = "".join([piece async for piece in streamed.text_stream])
        final = await streamed.get_final_message()
    assert text == block.text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == 20
    counted = await client.messages.count_tokens(model=MODEL, messages=[USER])  # type: ignore[list-item]
    assert counted.input_tokens == whole.usage.input_tokens


class Animal(BaseModel):
    name: str


async def test_anthropics_client_parses_what_a_schema_describes() -> None:
    async with (
        running(says('{"name": "fox"}')) as server,
        listening(server.app) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        request: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": [USER]}
        parsed = await client.messages.parse(**request, output_format=Animal)
        assert '"name"' in (server.runner.batches[-1].rows[0].seq.params.grammar or "")
    assert parsed.parsed_output == Animal(name="fox")


async def test_anthropics_client_raises_its_own_exceptions(
    client: anthropic.AsyncAnthropic,
) -> None:
    request: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": [USER]}
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.messages.create(**{**request, "model": "x"})
    assert missing.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        await client.messages.create(**{**request, "max_tokens": 0})
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        await client.messages.create(**{**request, "system": "x" * 500})


async def test_anthropics_client_raises_where_a_stream_fails() -> None:
    def fail(batch: Any) -> None:
        if any(row.seq.num_output_tokens > 3 for row in batch.rows):
            raise RuntimeError("told to")

    async with (
        running(runner={"fail": fail, "step_s": 0.01}) as server,
        listening(server.app) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        request: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": [USER]}
        streamed = await client.messages.create(**request, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="had an error"):
            async for _ in streamed:
                pass
