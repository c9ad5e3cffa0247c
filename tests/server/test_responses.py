"""POST /v1/responses in OpenAI's form, and through OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from server.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin
from server.protocol.schemas_responses import ResponseEvent, ResponseObject
from server.responses.output import Output
from skipllm_core.sequence import Sequence
from skipllm_core.tokenizer import ByteTokenizer
from tests.server.conftest import MODEL, Server, listening, make_profile, running
from tests.server.test_answers import Opinionated, sing

USER = {"role": "user", "content": "hi"}
STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def says(text: str) -> Any:
    """A model that gives one answer, and ends."""

    def next_token(seq: Sequence) -> int:
        return [*text.encode(), *ByteTokenizer().eos_token_ids][seq.num_output_tokens]

    return next_token


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, held against OpenAI's types and our own description."""
    *blocks, last = text.split("\n\n")
    assert last == ""
    found = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        STREAM_EVENT.validate_python(event)
        ResponseEvent.model_validate(event)
        found.append(event)
    return found


async def respond(server: Server, given: Any = "hi", **body: Any) -> dict[str, Any]:
    reply = await server.post("/v1/responses", {"input": given, **body})
    assert reply.status_code == 200, reply.text
    response: dict[str, Any] = reply.json()
    Response.model_validate(response)
    ResponseObject.model_validate(response)
    return response


async def refusal(server: Server, **body: Any) -> tuple[int, str | None, str | None]:
    reply = await server.post("/v1/responses", {"input": "hi", **body})
    error = reply.json()["error"]
    return reply.status_code, error["param"], error["code"]


def prompt_of(server: Server) -> str:
    """What the model was given last."""
    seq = server.runner.batches[-1].rows[0].seq
    return ByteTokenizer().decode(seq.token_ids[: seq.num_prompt_tokens])


def text_of(response: dict[str, Any]) -> str:
    text: str = response["output"][0]["content"][0]["text"]
    return text


# Answers -----------------------------------------------------------------------------------------


async def test_an_answer_has_openais_form() -> None:
    async with running(says("Hello."), skip_profile=make_profile()) as server:
        response = await respond(
            server, instructions="be brief", metadata={"a": "b"}, user="u", skip={"ratio": 0.25}
        )
    assert response["id"].startswith("resp_")
    (message,) = response["output"]
    assert message["id"].startswith("msg_")
    assert message["content"] == [
        {"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}
    ]
    assert response["status"] == message["status"] == "completed"
    assert response["incomplete_details"] is None
    assert response["completed_at"] >= response["created_at"]
    assert (response["instructions"], response["metadata"]) == ("be brief", {"a": "b"})
    assert (response["model"], response["user"], response["store"]) == (MODEL, "u", True)
    usage = response["usage"]
    assert usage["output_tokens"] == 7
    assert usage["total_tokens"] == usage["input_tokens"] + 7
    assert usage["skip"]["skipped_ffn_blocks"] > 0


async def test_an_answer_cut_off_is_incomplete(server: Server) -> None:
    response = await respond(server, max_output_tokens=5)
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None


async def test_an_answer_of_nothing_is_a_message_of_no_text() -> None:
    async with running(says("")) as server:
        assert text_of(await respond(server)) == ""
        reply = await server.post("/v1/responses", {"input": "hi", "stream": True})
    assert events(reply.text)[-1]["response"]["output"][0]["content"][0]["text"] == ""


async def test_a_stream_tells_every_step_and_ends_with_the_whole_response() -> None:
    async with running(sing) as server:
        body = {"input": "hi", "max_output_tokens": 20}
        whole = (await server.post("/v1/responses", body)).json()
        reply = await server.post("/v1/responses", {**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    told = events(reply.text)
    kinds = [event["type"] for event in told]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(event["delta"] for event in told[4:-4])
    assert text == told[-4]["text"] == told[-3]["part"]["text"] == text_of(whole)
    assert told[-2]["item"] == told[-1]["response"]["output"][0]
    assert len({event["item_id"] for event in told if "item_id" in event}) == 1
    names = {"id", "created_at", "completed_at", "output", "usage"}
    last = told[-1]["response"]
    assert {k: v for k, v in last.items() if k not in names} == {
        k: v for k, v in whole.items() if k not in names
    }
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert {event["response"]["id"] for event in told if "response" in event} == {last["id"]}


async def test_a_trace_tells_the_layers_skipped(server: Server) -> None:
    wish = {"ratio": 0.25, "trace": True}
    response = await respond(server, max_output_tokens=4, skip=wish)
    assert [len(layers) for layers in response["skip"]["skipped_layers"]] == [0, 0, 1, 1]
    body = {"input": "hi", "max_output_tokens": 4, "skip": wish, "stream": True}
    last = events((await server.post("/v1/responses", body)).text)[-1]["response"]
    assert last["skip"] == response["skip"]


async def test_a_trace_tells_the_neurons_left_out(server: Server) -> None:
    wish = {"policy": "neurons", "ratio": 0.25, "trace": True}
    response = await respond(server, max_output_tokens=4, skip=wish)
    assert [len(layers) for layers in response["skip"]["skipped_neurons"]] == [0, 0, 4, 4]
    assert response["usage"]["skip"]["skipped_ffn_share"] > 0
    body = {"input": "hi", "max_output_tokens": 4, "skip": wish, "stream": True}
    last = events((await server.post("/v1/responses", body)).text)[-1]["response"]
    assert last["skip"] == response["skip"]


async def test_log_probabilities_are_told_if_they_are_included() -> None:
    async with running(runner_type=Opinionated) as server:
        body = {"max_output_tokens": 3, "top_logprobs": 3}
        include = ["message.output_text.logprobs"]
        response = await respond(server, include=include, **body)
        logprobs = response["output"][0]["content"][0]["logprobs"]
        assert "".join(entry["token"] for entry in logprobs) == text_of(response)
        assert [len(entry["top_logprobs"]) for entry in logprobs] == [3, 3, 3]
        assert (await respond(server, **body))["output"][0]["content"][0]["logprobs"] == []
        stream = {"input": "hi", "include": include, "stream": True, **body}
        told = events((await server.post("/v1/responses", stream)).text)
    streamed = [entry for event in told if "delta" in event for entry in event["logprobs"]]
    assert streamed == logprobs


# What is asked -----------------------------------------------------------------------------------


async def test_items_become_the_chats_messages(server: Server) -> None:
    await respond(
        server,
        [
            {"role": "developer", "content": "D"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "U"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
            USER,
        ],
        instructions="I",
        max_output_tokens=1,
    )
    given = prompt_of(server)
    chat = [("system", "I"), ("developer", "D"), ("user", "U"), ("assistant", "A"), ("user", "hi")]
    messages = [{"role": role, "content": content} for role, content in chat]
    await server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert given == prompt_of(server)


async def test_parameters_reach_the_engine(server: Server) -> None:
    await respond(
        server, max_output_tokens=3, temperature=0.5, top_p=0.5, top_k=7, seed=11, stop="z"
    )
    params = server.runner.batches[-1].rows[0].seq.params
    assert (params.max_tokens, params.temperature, params.top_p) == (3, 0.5, 0.5)
    assert (params.top_k, params.seed) == (7, 11)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"input": 3}, "input", "invalid_type"),
        ({"input": []}, "input", "empty_array"),
        ({"input": [3]}, "input[0]", "invalid_type"),
        ({"input": [USER, {"content": "x"}]}, "input[1].type", "missing_required_parameter"),
        ({"input": [{"role": "boss", "content": ""}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"role": "user", "content": 3}]}, "input[0].content", "invalid_type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
            "missing_required_parameter",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "unsupported_value",
        ),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "unsupported_value"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f"}]},
            "input[0].arguments",
            "missing_required_parameter",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
            "input[0].call_id",
            "invalid_value",
        ),
        ({"input": [USER] * 4097}, "input", "array_above_max_length"),
        ({"input": [USER] * 2049}, "input", "array_above_max_length"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({"tools": [{"type": "custom"}] * 129}, "tools", "array_above_max_length"),
        ({"tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "unsupported_value"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x"}}},
            "text.format.schema",
            "missing_required_parameter",
        ),
        ({"text": {"verbosity": "high"}}, "text.verbosity", "unsupported_parameter"),
        ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
        ({"temperature": 2.5}, "temperature", "decimal_above_max_value"),
        ({"top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"include": ["everything"]}, "include[0]", "invalid_value"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"skip": {"ratio": 2}}, "skip.ratio", "decimal_above_max_value"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"max_tokens": 3}, "max_tokens", "unsupported_parameter"),
        ({"messages": []}, "messages", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"seed": "x"}, "seed", "invalid_type"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"model": "x"}, "model", "model_not_found"),
        ({"input": "x" * 200}, "input", "context_length_exceeded"),
        ({"previous_response_id": "r"}, "previous_response_id", "previous_response_not_found"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input", None),
    ],
)
async def test_what_is_wrong_is_told_in_the_requests_own_names(
    server: Server, body: dict[str, Any], param: str, code: str | None
) -> None:
    status, found_param, found_code = await refusal(server, **body)
    assert status in (400, 404)
    assert (found_param, found_code) == (param, code)


async def test_fields_that_ask_for_nothing_are_taken(server: Server) -> None:
    await respond(
        server,
        background=False,
        conversation=None,
        include=["reasoning.encrypted_content"],
        max_tool_calls=3,
        parallel_tool_calls=True,
        prompt_cache_key="k",
        reasoning={"summary": "auto"},
        safety_identifier="s",
        service_tier="auto",
        stream_options={"include_obfuscation": False},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        tool_choice="auto",
        tools=None,
        truncation="disabled",
    )


async def test_unknown_fields_are_ignored_unless_told_otherwise(server: Server) -> None:
    await respond(server, whatever=1)
    async with running(strict_params=True) as strict:
        assert await refusal(strict, whatever=1) == (400, "whatever", "unknown_parameter")


async def test_input_tokens_are_counted_as_they_are_used(server: Server) -> None:
    body = {"input": [USER], "instructions": "be brief"}
    counted = (await server.post("/v1/responses/input_tokens", body)).json()
    response = await respond(server, [USER], instructions="be brief", max_output_tokens=1)
    expected = response["usage"]["input_tokens"]
    assert counted == {"object": "response.input_tokens", "input_tokens": expected}


# What is stored ----------------------------------------------------------------------------------


async def test_a_response_is_continued_without_its_instructions(server: Server) -> None:
    first = await respond(server, "one", instructions="secret", max_output_tokens=4)
    second = await respond(
        server, "two", previous_response_id=first["id"], instructions="new", max_output_tokens=4
    )
    assert second["previous_response_id"] == first["id"]
    await respond(server, "three", previous_response_id=second["id"], max_output_tokens=1)
    given = prompt_of(server)
    turns = ["one", text_of(first), "two", text_of(second), "three"]
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    await server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert given == prompt_of(server)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stored_response_is_shown_listed_and_deleted(server: Server, stream: bool) -> None:
    body = {"input": [USER, {"role": "user", "content": "you"}], "stream": stream}
    reply = await server.post("/v1/responses", body)
    response = events(reply.text)[-1]["response"] if stream else reply.json()
    url = f"/v1/responses/{response['id']}"
    assert (await server.http.get(url)).json() == response
    listed = (await server.http.get(f"{url}/input_items")).json()
    assert [item["content"][0]["text"] for item in listed["data"]] == ["you", "hi"]
    assert (listed["first_id"], listed["has_more"]) == (listed["data"][0]["id"], False)
    page = (await server.http.get(f"{url}/input_items?limit=1&order=asc")).json()
    assert [item["content"][0]["text"] for item in page["data"]] == ["hi"]
    assert page["has_more"]
    after = (await server.http.get(f"{url}/input_items?order=asc&after={page['last_id']}")).json()
    assert [item["content"][0]["text"] for item in after["data"]] == ["you"]
    refused = await server.http.post(f"{url}/cancel")
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "Cannot cancel a synchronous response."
    assert (await server.http.get(f"{url}?stream=true")).status_code == 400
    deleted = (await server.http.delete(url)).json()
    assert deleted == {"id": response["id"], "object": "response", "deleted": True}
    for method, path in [
        ("GET", url), ("DELETE", url), ("POST", f"{url}/cancel"), ("GET", f"{url}/input_items"),
    ]:  # fmt: skip
        gone = await server.http.request(method, path)
        assert gone.status_code == 404
        assert gone.json()["error"]["message"] == f"Response with id '{response['id']}' not found."


async def test_an_item_of_a_stored_response_can_be_referred_to(server: Server) -> None:
    first = await respond(server, max_output_tokens=4)
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    second = await respond(server, [USER, reference, USER], max_output_tokens=1)
    assert text_of(first) in prompt_of(server)
    await server.http.delete(f"/v1/responses/{first['id']}")
    assert await refusal(server, input=[reference]) == (404, "input", None)
    await respond(server, previous_response_id=second["id"])  # it has the item itself


async def test_what_is_not_to_be_stored_is_not(server: Server) -> None:
    response = await respond(server, store=False)
    assert response["store"] is False
    assert (await server.http.get(f"/v1/responses/{response['id']}")).status_code == 404


async def test_the_store_can_be_off() -> None:
    async with running(responses_store_size=0) as server:
        response = await respond(server, store=True)
        assert response["store"] is False
        assert (await server.http.get(f"/v1/responses/{response['id']}")).status_code == 404


async def test_the_least_recently_used_response_goes_first() -> None:
    async with running(responses_store_size=2) as server:
        ids = [(await respond(server))["id"] for _ in range(2)]
        assert (await server.http.get(f"/v1/responses/{ids[0]}")).status_code == 200
        ids.append((await respond(server))["id"])
        found = [(await server.http.get(f"/v1/responses/{i}")).status_code for i in ids]
    assert found == [200, 404, 200]


async def test_the_store_is_bounded_in_bytes() -> None:
    async with running(responses_store_memory=40_000) as server:
        ids = [(await respond(server, metadata={"a": "x" * 512}))["id"] for _ in range(20)]
        found = [(await server.http.get(f"/v1/responses/{i}")).status_code for i in ids]
        assert found == sorted(found, reverse=True)  # 404 before 200: the oldest are gone
        assert 0 < found.count(200) < 20
        assert found[-1] == 200
        large = await respond(server, user="x" * 5000)
        assert large["store"] is False
        assert (await server.http.get(f"/v1/responses/{large['id']}")).status_code == 404
        assert (await server.http.get(f"/v1/responses/{ids[-1]}")).status_code == 200


# Parts become items ------------------------------------------------------------------------------

texts = st.text(max_size=4)
pieces = st.lists(
    st.one_of(
        st.builds(Content, texts),
        st.builds(Reasoning, texts),
        st.tuples(st.text(min_size=1, max_size=3), st.lists(texts, max_size=3)),
    ),
    max_size=8,
)


def parts_of(found: list[Any]) -> list[Part]:
    parts: list[Part] = []
    num_calls = 0
    for piece in found:
        if isinstance(piece, tuple):
            name, arguments = piece
            parts.append(ToolCallBegin(num_calls, f"call_{num_calls}", name))
            parts += [ToolCallArguments(num_calls, text) for text in arguments]
            num_calls += 1
        else:
            parts.append(piece)
    return parts


@given(pieces, st.sampled_from(["completed", "incomplete"]))
def test_what_the_events_tell_joins_to_the_items(found: list[Any], status: str) -> None:
    parts = parts_of(found)
    output = Output()
    told = [*output.add(parts, []), *output.finish(status)]
    items: dict[int, dict[str, Any]] = {}
    texts: dict[int, str] = {}
    for number, event in enumerate(told):
        STREAM_EVENT.validate_python({**event, "sequence_number": number})
        index = event["output_index"]
        match event["type"].rpartition(".")[2]:
            case "added" if "item" in event:
                assert index == len(items)
                items[index] = event["item"]
                texts[index] = ""
            case "delta":
                assert event["item_id"] == items[index]["id"]
                texts[index] += event["delta"]
            case "done" if "item" in event:
                assert event["item"] == output.items[index]
                assert event["item"]["id"] == items[index]["id"]
    statuses = [item["status"] for item in output.items]
    assert statuses == ["completed"] * (len(items) - 1) + [status]
    for index, item in enumerate(output.items):
        is_call = item["type"] == "function_call"
        whole = item["arguments"] if is_call else item["content"][0]["text"]
        assert whole == texts[index]
    calls = [(i["call_id"], i["name"]) for i in output.items if i["type"] == "function_call"]
    assert calls == [(part.id, part.name) for part in parts if isinstance(part, ToolCallBegin)]


# OpenAI's own client -----------------------------------------------------------------------------


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        listening(server.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_openais_client_responds_streaming_and_not(client: openai.AsyncOpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL, "input": "hi", "max_output_tokens": 20}
    whole = await client.responses.create(**request, extra_body={"skip": {"ratio": 0.25}})
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.model_extra is not None
    assert whole.usage.model_extra["skip"]["token_skip_ratio"] > 0
    async with client.responses.stream(**request) as stream:
        seen = [event async for event in stream]
    deltas = [e.delta for e in seen if e.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert seen[-1].type == "response.incomplete"
    raw = await client.responses.create(**request, stream=True)
    assert (await anext(aiter(raw))).type == "response.created"
    await raw.close()


async def test_openais_client_manages_stored_responses(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model=MODEL, input="one", max_output_tokens=5)
    second = await client.responses.create(
        model=MODEL, input="two", previous_response_id=first.id, max_output_tokens=5
    )
    assert (await client.responses.retrieve(second.id)).output_text == second.output_text
    items = [item async for item in client.responses.input_items.list(second.id, limit=1)]
    assert [item.type for item in items] == ["message"] * 3
    counted = await client.responses.input_tokens.count(model=MODEL, input="one")
    assert first.usage is not None
    assert counted.input_tokens == first.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        await client.responses.cancel(first.id)
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)


class Animal(BaseModel):
    name: str


async def test_openais_client_parses_what_a_schema_describes() -> None:
    async with (
        running(says('{"name": "fox"}')) as server,
        listening(server.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        parsed = await client.responses.parse(model=MODEL, input="hi", text_format=Animal)
        assert '"name"' in (server.runner.batches[-1].rows[0].seq.params.grammar or "")
    assert parsed.output_parsed == Animal(name="fox")
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_schema_that_does_not_compile_is_told_in_the_requests_own_name(
    server: Server, stream: bool
) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}
    found = await refusal(server, text={"format": form}, stream=stream)
    assert found == (400, "text.format.schema", "invalid_value")


async def test_openais_client_raises_where_a_stream_fails() -> None:
    def fail(batch: Any) -> None:
        if any(row.seq.num_output_tokens > 3 for row in batch.rows):
            raise RuntimeError("told to")

    async with (
        running(runner={"fail": fail, "step_s": 0.01}) as server,
        listening(server.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.responses.create(model=MODEL, input="hi", stream=True)
        seen: list[Any] = []
        with pytest.raises(openai.APIError, match="had an error"):
            await fill(seen, stream)
    assert seen[-1].type == "response.failed"
    assert seen[-1].response.status == "failed"
    assert seen[-1].response.error is not None
    assert seen[-1].response.error.code == "server_error"


async def fill(seen: list[Any], stream: Any) -> None:
    async for event in stream:
        seen.append(event)  # noqa: PERF401  # what came before the failure counts
