"""Tools, reasoning and structured output in chats, over a fake model that says a given text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI

from server.tools.style import ChatStyle
from skipllm_core.sequence import Sequence
from skipllm_core.tokenizer import ByteTokenizer
from tests.server.conftest import Server, make_profile, running
from tests.server.test_answers import events

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TOOLS = [WEATHER]
STRICT = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]  # type: ignore[dict-item]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ARGUMENTS = '{"city": "Köln 🦊"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
ROOM: dict[str, Any] = {"max_model_len": 2048, "runner": {"num_kv_blocks": 1024}}


def saying(text: str) -> Callable[[Sequence], int]:
    """A model that says this and ends, whatever it is asked."""
    said = [*text.encode(), ByteTokenizer.EOS]
    return lambda seq: said[min(seq.num_output_tokens, len(said) - 1)]


def thinking(parser: Any = "auto") -> ChatStyle:
    return ChatStyle.of(ByteTokenizer(), parser=parser, reasoning_parser="think")


async def asked(text: str, *, style: ChatStyle | None = None, **body: Any) -> dict[str, Any]:
    """The one choice of the answer of a model that says `text`."""
    async with running(saying(text), chat_style=style, **ROOM) as server:
        reply = await server.chat(**{"tools": TOOLS, **body})
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    assert isinstance(choice, dict)
    return choice


async def streamed(
    text: str, *, style: ChatStyle | None = None, **body: Any
) -> list[dict[str, Any]]:
    """The chunks of the same, streamed."""
    runner = {"num_kv_blocks": 1024, "step_s": 0.002}  # not all in one step
    async with running(saying(text), chat_style=style, **{**ROOM, "runner": runner}) as server:
        reply = await server.chat(**{"tools": TOOLS, "stream": True, **body})
    assert reply.status_code == 200, reply.text
    return events(reply.text)


def functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message["tool_calls"]]


CALLED = [{"name": "get_weather", "arguments": ARGUMENTS}]


async def test_a_call_is_told_as_openai_tells_it() -> None:
    choice = await asked(CALL)
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    (call,) = message.pop("tool_calls")
    assert message == {"role": "assistant", "content": None, "refusal": None}
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": CALLED[0]}


async def test_text_before_calls_is_content_and_there_may_be_several() -> None:
    choice = await asked(f"Let me see.\n{CALL}\n{CALL}")
    assert choice["message"]["content"] == "Let me see.\n"
    assert functions(choice["message"]) == CALLED * 2
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 2


async def test_a_streamed_call_begins_with_its_name_and_its_arguments_follow() -> None:
    chunks = await streamed(CALL)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    begin, *pieces = [delta["tool_calls"][0] for delta in deltas[1:-1]]
    assert begin.pop("id").startswith("call_")
    assert begin == {
        "index": 0,
        "type": "function",
        "function": {"name": "get_weather", "arguments": ""},
    }
    assert all(set(piece) == {"index", "function"} for piece in pieces)
    assert "".join(piece["function"]["arguments"] for piece in pieces) == ARGUMENTS
    assert len(pieces) > 1
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"Hm. {CALL}\n{CALL}",
        "<think>\nA { b\n</think>\n\nHi",
        f"<think>So</think>{CALL}",
        '<tool_call>\n{"name": "get_weather", "arguments": [1]}\n</tool_call>',
        "No <tool",
    ],
)
async def test_openais_client_reads_the_same_streamed_and_whole(text: str) -> None:
    async with running(saying(text), chat_style=thinking(), **ROOM) as server:
        client = AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=server.http)
        question: Any = {
            "model": "fake",
            "messages": [{"role": "user", "content": "w?"}],
            "tools": TOOLS,
        }
        whole = (await client.chat.completions.create(**question)).choices[0]
        async with client.chat.completions.stream(**question) as stream:
            joined = (await stream.get_final_completion()).choices[0]
        thoughts = ""
        async for chunk in await client.chat.completions.create(**question, stream=True):
            delta: Any = chunk.choices[0].delta
            thoughts += getattr(delta, "reasoning_content", "")
    assert joined.finish_reason == whole.finish_reason
    assert (joined.message.content or None) == whole.message.content
    assert thoughts == getattr(whole.message, "reasoning_content", "")
    assert [call.function.arguments for call in joined.message.tool_calls or []] == [
        call.function.arguments  # type: ignore[union-attr]
        for call in whole.message.tool_calls or []
    ]


@pytest.mark.parametrize("body", [{"tools": None}, {"tool_choice": "none"}, {"tools": []}])
async def test_without_tools_a_call_is_only_text(body: dict[str, Any]) -> None:
    choice = await asked(CALL, **body)
    assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_a_function_that_is_not_among_those_allowed_is_not_called() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"mode": "auto", "tools": [other]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    found = await asked(CALL, tools=[*TOOLS, other], tool_choice=choice)
    assert found["message"]["content"] == CALL


async def test_the_model_is_told_of_its_tools_only_if_it_may_call_them() -> None:
    async with running(saying("Hi"), **ROOM) as server:
        sizes = []
        for body in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}):
            reply = await server.chat(**body)
            sizes.append(reply.json()["usage"]["prompt_tokens"])
    assert sizes[1] > sizes[0] + 200
    assert sizes[2] == sizes[0]


async def test_tokenizing_counts_what_tools_take() -> None:
    async with running(saying("Hi"), **ROOM) as server:
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
        counted = (await server.post("/tokenize", body)).json()["count"]
        asked = (await server.chat(tools=TOOLS)).json()["usage"]["prompt_tokens"]
    assert counted == asked


async def test_a_conversation_with_tools_goes_on() -> None:
    async with running(saying("It is warm."), **ROOM) as server:
        call = {"id": "call_1", "type": "function", "function": CALLED[0]}
        parts = [{"type": "text", "text": "21"}, {"type": "text", "text": "degrees"}]
        messages = [
            {"role": "user", "content": "w?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": parts},
        ]
        body = {"messages": messages, "tools": TOOLS}
        reply = await server.post("/v1/chat/completions", {**body, "return_token_ids": True})
    assert reply.json()["choices"][0]["message"]["content"] == "It is warm."
    prompt = ByteTokenizer().decode(reply.json()["prompt_token_ids"])
    assert CALL in prompt
    assert "<tool_response>\n21\ndegrees\n</tool_response>" in prompt


async def test_only_one_call_is_made_where_more_are_not_wanted() -> None:
    text = f"{CALL}\n{CALL} and more"
    for body in ({}, {"stop": ["zzz"]}, {"logprobs": True}):
        choice = await asked(text, parallel_tool_calls=False, **body)
        assert functions(choice["message"]) == CALLED
        assert choice["finish_reason"] == "tool_calls"
    chunks = await streamed(text, parallel_tool_calls=False)
    assert {call["index"] for chunk in chunks for call in _calls(chunk)} == {0}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def _calls(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for choice in chunk["choices"] for c in choice["delta"].get("tool_calls", ())]


async def test_generating_ends_with_the_only_call_that_is_wanted() -> None:
    async with running(saying(CALL + " " + "x" * 1000), **ROOM) as server:
        reply = await server.chat(tools=TOOLS, parallel_tool_calls=False)
    assert reply.json()["usage"]["completion_tokens"] <= len(CALL.encode())


async def test_a_call_cut_off_by_max_tokens_ends_for_that_reason() -> None:
    choice = await asked(CALL, max_tokens=len(CALL.encode()) - 20)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] in ARGUMENTS


async def test_what_looks_like_a_call_and_is_none_is_content() -> None:
    for text in ('<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', "<tool_call>{"):
        choice = await asked(text)
        assert choice["message"]["content"] == text
        assert choice["finish_reason"] == "stop"


async def test_llamas_and_mistrals_calls_are_read_where_the_server_is_told_so() -> None:
    llama = ChatStyle.of(ByteTokenizer(), parser="llama3_json")
    said = f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}'
    assert functions((await asked(said, style=llama))["message"]) == CALLED
    mistral = ChatStyle.of(ByteTokenizer(), parser="mistral")
    said = f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}"
    assert functions((await asked(said, style=mistral))["message"]) == CALLED
    none = ChatStyle.of(ByteTokenizer(), parser="none")
    assert (await asked(CALL, style=none))["message"]["content"] == CALL


async def test_choices_are_read_apart() -> None:
    async with running(saying(CALL), **ROOM) as server:
        reply = await server.chat(tools=TOOLS, n=3)
        choices = reply.json()["choices"]
        chunks = events((await server.chat(tools=TOOLS, n=2, stream=True)).text)
    assert [functions(choice["message"]) for choice in choices] == [CALLED] * 3
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in choices}) == 3
    for index in range(2):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        pieces = [
            call["function"]["arguments"] for c in own for call in c["delta"].get("tool_calls", ())
        ]
        assert "".join(pieces) == ARGUMENTS
        assert own[-1]["finish_reason"] == "tool_calls"


async def test_every_token_is_told_once_though_its_text_is_held() -> None:
    chunks = await streamed(
        f"Hi {CALL}",
        return_token_ids=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    ids = [i for chunk in chunks for c in chunk["choices"] for i in c.get("token_ids") or ()]
    assert ids == [*f"Hi {CALL}".encode(), ByteTokenizer.EOS]
    counted = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counted == sorted(counted)
    assert (counted[0], counted[-1]) == (0, len(ids))


async def test_skipped_layers_are_traced_through_calls() -> None:
    async with running(saying(CALL), skip_profile=make_profile(), **ROOM) as server:
        skip = {"policy": "ffn_skip", "ratio": 0.2, "trace": True}
        reply = await server.chat(tools=TOOLS, skip=skip)
    content = reply.json()
    assert content["usage"]["skip"]["skipped_ffn_blocks"] > 0
    assert functions(content["choices"][0]["message"]) == CALLED
    assert len(content["choices"][0]["skip"]["skipped_layers"]) == len(CALL.encode()) + 1


# Reasoning ----------------------------------------------------------------------------------------


async def test_reasoning_is_told_apart_and_counted() -> None:
    async with running(saying("<think>\nHm 🦊\n</think>\n\nHi"), chat_style=thinking()) as server:
        content = (await server.chat()).json()
    message = content["choices"][0]["message"]
    assert message["content"] == "Hi"
    assert message["reasoning_content"] == message["reasoning"] == "Hm 🦊"
    num_tokens = len("\nHm 🦊\n</think>".encode())
    assert content["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_tokens}


async def test_reasoning_alone_leaves_no_content() -> None:
    choice = await asked("<think>Hm, well", style=thinking(), max_tokens=10)
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "Hm,"
    assert choice["finish_reason"] == "length"


async def test_streamed_reasoning_comes_in_deltas_of_its_own() -> None:
    chunks = await streamed("<think>Hm</think>Hello", style=thinking(), tools=None)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]]
    thoughts = [delta for delta in deltas if "reasoning_content" in delta]
    assert deltas == [*thoughts, *({"content": d["content"]} for d in deltas if "content" in d)]
    assert all(delta["reasoning_content"] == delta["reasoning"] for delta in thoughts)
    assert "".join(delta["reasoning"] for delta in thoughts) == "Hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello"


async def test_reasoning_that_nobody_wants_is_counted_and_not_told() -> None:
    said, wish = "<think>Hm</think>Hello", {"include_reasoning": False}
    async with running(saying(said), chat_style=thinking()) as server:
        content = (await server.chat(**wish)).json()
    assert content["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hello",
        "refusal": None,
    }
    assert content["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    chunks = await streamed(said, style=thinking(), tools=None, **wish)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]]
    assert "".join(delta["content"] for delta in deltas) == "Hello"


async def test_stop_strings_end_the_answer_and_not_the_thought() -> None:
    text = "<think>Paris.\nOr Rome.</think>Paris.\nYes."
    choice = await asked(text, style=thinking(), stop=["\n"])
    assert choice["message"]["reasoning_content"] == "Paris.\nOr Rome."
    assert choice["message"]["content"] == "Paris."
    assert choice["stop_reason"] == "\n"


async def test_a_model_without_reasoning_says_what_it_says() -> None:
    choice = await asked("<think>Hm</think>Hi", tools=None)
    assert choice["message"] == {
        "role": "assistant",
        "content": "<think>Hm</think>Hi",
        "refusal": None,
    }


async def test_calls_follow_the_reasoning() -> None:
    choice = await asked(f"<think>So {CALL}</think>\n{CALL}", style=thinking())
    assert choice["message"]["reasoning_content"] == f"So {CALL}"
    assert functions(choice["message"]) == CALLED


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({"reasoning_effort": "none"}, {"enable_thinking": False, "thinking": False}),
        ({"reasoning_effort": "minimal"}, {"enable_thinking": False, "thinking": False}),
        ({"reasoning_effort": "high"}, {"enable_thinking": True, "thinking": True}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"enable_thinking": True, "thinking": False},
        ),
        ({}, {}),
    ],
)
async def test_effort_turns_reasoning_on_and_off_in_the_template(
    monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], options: dict[str, Any]
) -> None:
    seen: dict[str, Any] = {}
    encode = ByteTokenizer.encode_chat

    def encode_chat(self: ByteTokenizer, messages: Any, **given: Any) -> list[int]:
        seen.update(given["options"])
        return encode(self, messages, **given)

    async with running(saying("Hi")) as server:
        monkeypatch.setattr(ByteTokenizer, "encode_chat", encode_chat)
        assert (await server.chat(**body)).status_code == 200
    seen.pop("reasoning_effort", None)
    assert seen == options


# What is promised by grammar ----------------------------------------------------------------------


async def grammar_of(style: ChatStyle | None = None, **body: Any) -> str | None:
    """The grammar that the engine is given."""
    grammars = []

    def look(seq: Sequence) -> int:
        grammars.append(seq.params.grammar)
        return ByteTokenizer.EOS

    async with running(look, chat_style=style, **ROOM) as server:
        reply = await server.chat(**body)
    assert reply.status_code == 200, reply.text
    return grammars[0]


SCHEMA_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}},
}


async def test_only_promises_need_a_grammar() -> None:
    assert await grammar_of(tools=TOOLS) is None
    assert await grammar_of(tools=TOOLS, parallel_tool_calls=False) is None
    assert await grammar_of(tools=STRICT, tool_choice="none") is None
    promises: list[dict[str, Any]] = [
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": NAMED},
        {"tools": STRICT},
        {"tools": TOOLS, "response_format": SCHEMA_FORMAT},
    ]
    for promise in promises:
        grammar = await grammar_of(**promise)
        assert grammar is not None
        assert "get_weather" in grammar


async def test_reasoning_comes_before_what_a_grammar_describes() -> None:
    grammar = await grammar_of(thinking(), response_format=SCHEMA_FORMAT)
    assert grammar is not None
    assert "<think>" in grammar
    grammar = await grammar_of(thinking(), tools=TOOLS, tool_choice="required")
    assert grammar is not None
    assert "<think>" in grammar


async def test_a_function_that_was_named_is_called_and_openai_says_stop() -> None:
    whole = await asked(CALL, tool_choice=NAMED)
    assert functions(whole["message"]) == CALLED
    assert whole["finish_reason"] == "stop"
    chunks = await streamed(CALL, tool_choice=NAMED)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    required = await asked(CALL, tool_choice="required")
    assert required["finish_reason"] == "tool_calls"


async def test_a_server_that_reads_no_calls_promises_none() -> None:
    none = ChatStyle.of(ByteTokenizer(), parser="none")
    async with running(saying(CALL), chat_style=none, **ROOM) as server:
        reply = await server.chat(tools=TOOLS, tool_choice="required")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "tool_choice"


async def test_server_info_tells_how_tools_are_handled(server: Server) -> None:
    content = (await server.http.get("/server_info")).json()
    assert content["tools"] == {"template": False, "parser": "hermes", "reasoning_parser": "none"}


# Bad requests -------------------------------------------------------------------------------------


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"properties": schema}
    return schema


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}, fields]}


A_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": {}}, "tools", "invalid_type"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"tools": [function(name="a b")]}, "tools[0].function.name", "invalid_value"),
    ({"tools": [function(name="")]}, "tools[0].function.name", "empty_string"),
    (
        {"tools": [function(name="a" * 65)]},
        "tools[0].function.name",
        "string_above_max_length",
    ),
    (
        {"tools": [function(parameters={"type": "string"})]},
        "tools[0].function.parameters",
        "invalid_function_parameters",
    ),
    (
        {"tools": [function(parameters=deep(65))]},
        "tools[0].function.parameters",
        "invalid_value",
    ),
    ({"tools": [function(description="x" * 300_000)]}, "tools", "invalid_value"),
    ({"tools": [function()] * 129}, "tools", "array_above_max_length"),
    ({"tools": [function()], "tool_choice": "always"}, "tool_choice", "invalid_value"),
    ({"tools": [function()], "tool_choice": 3}, "tool_choice", "invalid_type"),
    ({"tools": [function()], "tool_choice": NAMED}, "tool_choice", "invalid_value"),
    (
        {"tools": [function()], "tool_choice": {"type": "function"}},
        "tool_choice.function",
        "missing_required_parameter",
    ),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tool_choice": NAMED, "tools": []}, "tool_choice", "invalid_value"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "invalid_type"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"function_call": {"name": "f"}}, "function_call", "unsupported_parameter"),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
    (
        message(role="tool", content="x"),
        "messages[1].tool_call_id",
        "missing_required_parameter",
    ),
    (
        message(role="tool", tool_call_id="x"),
        "messages[1].content",
        "missing_required_parameter",
    ),
    (
        message(role="assistant", function_call={"name": "f"}),
        "messages[1].function_call",
        "unsupported_parameter",
    ),
    (
        message(role="assistant", tool_calls=[{**A_CALL, "function": {"name": "f"}}]),
        "messages[1].tool_calls[0].function.arguments",
        "missing_required_parameter",
    ),
    (
        message(role="assistant", tool_calls=[A_CALL] * 129),
        "messages[1].tool_calls",
        "array_above_max_length",
    ),
]


@pytest.mark.parametrize(("body", "param", "code"), BAD, ids=lambda value: str(value)[:50])
async def test_what_is_wrong_with_tools_is_named(
    server: Server, body: dict[str, Any], param: str, code: str
) -> None:
    reply = await server.chat(**body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert len(reply.text) < 4096


async def test_what_replaced_functions_is_said(server: Server) -> None:
    message = (await server.chat(functions=[{"name": "f"}])).json()["error"]["message"]
    assert message.endswith("is not supported by this server. Use 'tools' instead.")


async def test_tools_that_leave_no_room_are_refused(server: Server) -> None:
    reply = await server.chat(tools=[function(description="x" * 1000)])
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
