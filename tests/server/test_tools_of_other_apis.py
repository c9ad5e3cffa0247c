"""Tools and reasoning through /v1/responses and /v1/messages, and what their clients make of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest

from server.tools.style import ChatStyle
from skipllm_core.tokenizer import ByteTokenizer
from tests.server.conftest import MODEL, Server, listening, running
from tests.server.test_messages import USER, send, stream
from tests.server.test_responses import events, respond, says

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
ANSWER = f"<think>Hmm.</think>Let me look.{CALL}"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTIONS = [{"type": "function", "name": "weather", "description": "D", "parameters": SCHEMA}]
TOOLS = [{"name": "weather", "description": "D", "input_schema": SCHEMA}]
CHAT_TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "D", "parameters": SCHEMA}}
]


@pytest.fixture
async def caller() -> AsyncIterator[Server]:
    style = ChatStyle.of(ByteTokenizer(), reasoning_parser="think")
    async with running(says(ANSWER), max_model_len=4000, chat_style=style) as server:
        yield server


def last_prompt(server: Server) -> list[int]:
    seq = server.runner.batches[-1].rows[0].seq
    return seq.token_ids[: seq.num_prompt_tokens]


async def chats_prompt(server: Server) -> list[int]:
    """Of the same conversation as a chat."""
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    messages = [
        USER,
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [{"id": "c", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    await server.post("/v1/chat/completions", {"messages": messages, "tools": CHAT_TOOLS})
    return last_prompt(server)


async def test_a_response_has_reasoning_text_and_call_as_items(caller: Server) -> None:
    response = await respond(caller, tools=FUNCTIONS)
    reasoning, message, call = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert message["content"][0]["text"] == "Let me look."
    assert (call["name"], call["arguments"]) == ("weather", '{"city": "Oslo"}')
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    reply = await caller.post("/v1/responses", {"input": "hi", "tools": FUNCTIONS, "stream": True})
    streamed = events(reply.text)[-1]["response"]["output"]
    ids = {"id", "call_id"}
    assert [{k: v for k, v in item.items() if k not in ids} for item in streamed] == [
        {k: v for k, v in item.items() if k not in ids} for item in response["output"]
    ]


@pytest.mark.parametrize("is_stored", [True, False])
async def test_a_calls_output_goes_on_with_the_conversation(
    caller: Server, is_stored: bool
) -> None:
    first = await respond(caller, "hi", tools=FUNCTIONS, store=is_stored)
    output = {"type": "function_call_output", "call_id": first["output"][2]["call_id"]}
    output["output"] = "sunny"
    if is_stored:
        await respond(caller, [output], previous_response_id=first["id"], tools=FUNCTIONS)
    else:
        await respond(caller, [USER, *first["output"], output], tools=FUNCTIONS)
    assert last_prompt(caller) == await chats_prompt(caller)


async def test_a_message_has_thinking_text_and_tool_use_as_blocks(caller: Server) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    body: dict[str, Any] = {"tools": TOOLS, "max_tokens": 300, "thinking": thinking}
    message = await send(caller, **body)
    thought, said, use = message["content"]
    assert thought["thinking"] == "Hmm."
    assert thought["signature"]
    assert said["text"] == "Let me look."
    assert (use["name"], use["input"]) == ("weather", {"city": "Oslo"})
    assert message["stop_reason"] == "tool_use"
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    told = await stream(caller, **body)
    deltas = [event["delta"] for event in told if event["type"] == "content_block_delta"]
    json_text = "".join(delta.get("partial_json", "") for delta in deltas)
    assert json_text == '{"city": "Oslo"}'
    assert "".join(delta.get("thinking", "") for delta in deltas) == "Hmm."
    assert {"type": "signature_delta", "signature": thought["signature"]} in deltas
    assert told[-2]["delta"]["stop_reason"] == "tool_use"


async def test_a_tools_result_goes_on_with_the_conversation(caller: Server) -> None:
    first = await send(caller, tools=TOOLS, max_tokens=300)
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": first["content"][-1]["id"]}
    result["content"] = [{"type": "text", "text": "sunny"}]
    messages = [
        USER,
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result]},
    ]
    await send(caller, messages, tools=TOOLS)
    assert last_prompt(caller) == await chats_prompt(caller)
    result["is_error"] = True
    await send(caller, messages, tools=TOOLS)
    assert "Error:\nsunny" in ByteTokenizer().decode(last_prompt(caller))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("responses", {"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        (
            "responses",
            {"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]},
            "tools[0].parameters",
        ),
        ("responses", {"tool_choice": "required"}, "tool_choice"),
        (
            "responses",
            {"tools": FUNCTIONS, "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice",
        ),
        ("responses", {"reasoning": {"effort": "wild"}}, "reasoning.effort"),
        ("messages", {"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        (
            "messages",
            {"tools": [{"name": "f", "input_schema": {"type": "array"}}]},
            "tools[0].input_schema",
        ),
        (
            "messages",
            {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}},
            "tool_choice",
        ),
    ],
)
async def test_what_is_wrong_with_tools_is_told_in_the_requests_own_names(
    caller: Server, path: str, body: dict[str, Any], param: str
) -> None:
    least = {"input": "hi"} if path == "responses" else {"messages": [USER], "max_tokens": 1}
    reply = await caller.post(f"/v1/{path}", {**least, **body})
    assert reply.status_code == 400
    assert param in (error := reply.json()["error"]).get("param", error["message"])


async def test_a_choice_of_tools_reaches_the_engine_as_a_grammar(caller: Server) -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": [
        {"type": "function", "name": "weather"}
    ]}  # fmt: skip
    least = {
        "responses": {"input": "hi", "max_output_tokens": 9},
        "messages": {"messages": [USER], "max_tokens": 9},
    }
    named = {"type": "function", "name": "weather"}
    wishes: list[tuple[str, Any, Any]] = [
        *(("responses", FUNCTIONS, chosen) for chosen in ("required", named, choice)),
        *(("messages", TOOLS, chosen) for chosen in ({"type": "any"}, {**named, "type": "tool"})),
    ]
    for path, tools, chosen in wishes:
        # It ends while the model still thinks: what this one says then is no call alone.
        body = {**least[path], "tools": tools, "tool_choice": chosen}
        assert (await caller.post(f"/v1/{path}", body)).status_code == 200
        assert caller.runner.batches[-1].rows[0].seq.params.grammar is not None


async def test_the_clients_read_calls(caller: Server) -> None:
    async with listening(caller.app) as url:
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
            client.responses.stream(model=MODEL, input="hi", tools=FUNCTIONS) as streamed,  # type: ignore[arg-type]
        ):
            response = await streamed.get_final_response()
        assert response.output[-1].type == "function_call"
        assert response.output[-1].arguments == '{"city": "Oslo"}'
        async with (
            anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0) as client_,
            client_.messages.stream(
                model=MODEL,
                max_tokens=300,
                messages=[USER],
                tools=TOOLS,  # type: ignore[list-item]
            ) as streamed_,
        ):
            message = await streamed_.get_final_message()
    assert message.content[-1].type == "tool_use"
    assert message.content[-1].input == {"city": "Oslo"}
    assert message.stop_reason == "tool_use"
