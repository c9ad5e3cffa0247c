"""The anthropic package, as its own documentation uses it."""

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.clients.scripted import ARGUMENTS, RESULT_TEXT
from tests.e2e.serving import Served

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0}  # the package has dropped the parameter; the API has not
EMBEDDED, SCRIPTED = "skipllm-demo", "scripted"
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in San Francisco?"}]
GET_WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather at a place.",
    "input_schema": {
        "type": "object",
        "properties": {"location": {"type": "string"}},
        "required": ["location"],
    },
}
SET_LAMP: Any = {
    "name": "set_lamp",
    "input_schema": {
        "type": "object",
        "properties": {"room": {"enum": ["hall", "attic"]}},
        "required": ["room"],
        "additionalProperties": False,
    },
}


def connect(served: Served) -> Anthropic:
    return Anthropic(base_url=served.url, api_key="none", max_retries=0)


@pytest.fixture
def client(embedded: Served) -> Iterator[Anthropic]:
    with connect(embedded) as client:
        yield client


@pytest.fixture
def scripted_client(scripted: Served) -> Iterator[Anthropic]:
    with connect(scripted) as client:
        yield client


def test_a_message_is_answered(client: Anthropic) -> None:
    answer = client.messages.create(
        model=EMBEDDED, extra_body=GREEDY, max_tokens=40, messages=FRANCE, system="Be brief."
    )
    (block,) = answer.content
    assert block.type == "text"
    assert answer.role == "assistant"
    assert answer.stop_reason == "end_turn"
    assert answer.usage.input_tokens > 0
    assert answer.usage.output_tokens > 0


def test_a_streamed_message_is_the_whole_one(client: Anthropic) -> None:
    asked: Any = {"model": EMBEDDED, "max_tokens": 40, "messages": FRANCE, "extra_body": GREEDY}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 1
    assert "Paris" in "".join(pieces)
    assert [block.text for block in whole.content] == [block.text for block in final.content]
    assert final.stop_reason == whole.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens


async def test_the_asynchronous_client_streams(embedded: Served) -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=embedded.url, api_key="none") as client,
        client.messages.stream(
            model=EMBEDDED, extra_body=GREEDY, max_tokens=40, messages=FRANCE
        ) as stream,
    ):
        text = "".join([piece async for piece in stream.text_stream])
    assert "Paris" in text


def test_a_stop_sequence_is_named(client: Anthropic) -> None:
    answer = client.messages.create(
        model=EMBEDDED, extra_body=GREEDY, max_tokens=40, messages=FRANCE, stop_sequences=["Paris"]
    )
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence == "Paris"


def test_an_answer_that_is_cut_says_so(client: Anthropic) -> None:
    answer = client.messages.create(
        model=EMBEDDED, extra_body=GREEDY, max_tokens=2, messages=FRANCE
    )
    assert answer.stop_reason == "max_tokens"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "set_lamp"}])
def test_a_forced_tool_is_called_by_any_model(client: Anthropic, choice: Any) -> None:
    answer = client.messages.create(
        model=EMBEDDED,
        extra_body=GREEDY,
        max_tokens=400,
        messages=FRANCE,
        tools=[SET_LAMP],
        tool_choice=choice,
    )
    assert answer.stop_reason == "tool_use"
    calls = [block for block in answer.content if block.type == "tool_use"]
    assert calls
    assert all(call.name == "set_lamp" for call in calls)
    assert all(call.input["room"] in ("hall", "attic") for call in calls)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_conversation_goes_through_a_tool(scripted_client: Anthropic, streamed: bool) -> None:
    def say(messages: Any) -> Any:
        asked: Any = {"model": SCRIPTED, "max_tokens": 400, "messages": messages}
        asked["tools"] = [GET_WEATHER]
        if not streamed:
            return scripted_client.messages.create(**asked)
        with scripted_client.messages.stream(**asked) as stream:
            return stream.get_final_message()

    first = say(WEATHER)
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert call.name == "get_weather"
    assert call.input == ARGUMENTS
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [{"role": "assistant", "content": first.content}]
    second = say([*WEATHER, *turns, {"role": "user", "content": [result]}])
    assert second.stop_reason == "end_turn"
    assert second.content[0].text == RESULT_TEXT


def test_tokens_are_counted_as_a_message_counts_them(client: Anthropic) -> None:
    asked: Any = {"model": EMBEDDED, "messages": FRANCE, "system": "Be brief."}
    counted = client.messages.count_tokens(**asked)
    answer = client.messages.create(max_tokens=1, **asked)
    assert counted.input_tokens == answer.usage.input_tokens > 0


def test_errors_are_the_clients_own(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="gpt-4o", max_tokens=4, messages=FRANCE)
    assert isinstance(unknown.value.body, dict)
    assert unknown.value.body["type"] == "error"
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(model=EMBEDDED, extra_body=GREEDY, max_tokens=0, messages=FRANCE)
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["error"]["type"] == "invalid_request_error"
