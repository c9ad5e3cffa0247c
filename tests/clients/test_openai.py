"""The openai package, as its own documentation uses it."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ParsedChatCompletion
from pydantic import BaseModel, Field

from tests.clients.scripted import ARGUMENTS, GREETING_TEXT, RESULT_TEXT
from tests.e2e.serving import Served

pytestmark = pytest.mark.slow

EMBEDDED, SCRIPTED = "skipllm-demo", "scripted"
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in San Francisco?"}]


class Answer(BaseModel):
    """Bounded, so that a model that does not know JSON comes to its end."""

    city: Literal["Berlin", "Paris", "Rome"]
    certain: bool
    letters: int = Field(ge=1, le=9)


def tool(name: str, **properties: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    schema["additionalProperties"] = False
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}


GET_WEATHER = tool("get_weather", location={"type": "string"})
SET_LAMP = tool("set_lamp", room={"enum": ["hall", "attic"]}, on={"type": "boolean"})


@pytest.fixture
def client(embedded: Served) -> Iterator[OpenAI]:
    with embedded.openai() as client:
        yield client


@pytest.fixture
def scripted_client(scripted: Served) -> Iterator[OpenAI]:
    with scripted.openai() as client:
        yield client


def test_an_answer_bears_what_was_skipped(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=EMBEDDED, messages=FRANCE, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["skip"]["skipped_ffn_share"] > 0


async def test_the_asynchronous_client_streams_the_same_text(embedded: Served) -> None:
    text = ""
    async with AsyncOpenAI(base_url=f"{embedded.url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(model=EMBEDDED, messages=FRANCE, temperature=0)
        stream = await client.chat.completions.create(
            model=EMBEDDED, messages=FRANCE, temperature=0, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content


def test_the_stream_helper_gathers_the_completion(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=EMBEDDED, messages=FRANCE, temperature=0, stream_options={"include_usage": True}
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert "Paris" in text
    assert final.choices[0].message.content == text
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None


def test_an_unknown_model_is_a_not_found_error(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4o", messages=FRANCE)
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("number", range(3))
def test_a_pydantic_model_is_parsed_from_any_model(client: OpenAI, number: int) -> None:
    answer: ParsedChatCompletion[Answer] = client.chat.completions.parse(
        model=EMBEDDED, messages=FRANCE, response_format=Answer, seed=number
    )
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_the_stream_helper_parses_a_pydantic_model(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=EMBEDDED, messages=FRANCE, response_format=Answer, temperature=0
    ) as stream:
        contents = [event for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(contents) > 1
    assert isinstance(final.choices[0].message.parsed, Answer)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "set_lamp"}}]
)
def test_a_forced_tool_is_called_by_any_model(client: OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model=EMBEDDED, messages=FRANCE, tools=[SET_LAMP], tool_choice=choice
    )
    assert answer.choices[0].finish_reason == "tool_calls" or choice != "required"
    calls = answer.choices[0].message.tool_calls
    assert calls
    for call in calls:
        assert call.type == "function"
        assert call.id
        assert call.function.name == "set_lamp"
        arguments = json.loads(call.function.arguments)
        assert arguments.keys() == {"room", "on"}
        assert arguments["room"] in ("hall", "attic")
        assert isinstance(arguments["on"], bool)


def test_a_streamed_tool_call_is_the_whole_one(client: OpenAI) -> None:
    asked: Any = {"model": EMBEDDED, "messages": FRANCE, "tools": [SET_LAMP], "temperature": 0}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked).choices[0].message.tool_calls
    with client.chat.completions.stream(**asked) as stream:
        deltas = [
            event.arguments_delta
            for event in stream
            if event.type == "tool_calls.function.arguments.delta"
        ]
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert whole is not None
    assert streamed is not None
    assert len(whole) == len(streamed) == 1
    assert len(deltas) > 1
    assert whole[0].type == "function"
    assert "".join(deltas) == streamed[0].function.arguments == whole[0].function.arguments
    assert streamed[0].function.name == "set_lamp"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_conversation_goes_through_a_tool(scripted_client: OpenAI, streamed: bool) -> None:
    def say(messages: Any) -> Any:
        asked: Any = {"model": SCRIPTED, "messages": messages, "tools": [GET_WEATHER]}
        if not streamed:
            return scripted_client.chat.completions.create(**asked).choices[0]
        with scripted_client.chat.completions.stream(**asked) as stream:
            return stream.get_final_completion().choices[0]

    first = say(WEATHER)
    assert first.finish_reason == "tool_calls"
    assert not first.message.content
    (call,) = first.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == ARGUMENTS
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "sunny"}'}
    second = say([*WEATHER, first.message.to_dict(), result])
    assert second.finish_reason == "stop"
    assert second.message.content == RESULT_TEXT


def test_tools_that_may_not_be_called_are_not(scripted_client: OpenAI) -> None:
    answer = scripted_client.chat.completions.create(
        model=SCRIPTED, messages=WEATHER, tools=[GET_WEATHER], tool_choice="none"
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"


def test_a_response_is_created_and_its_text_read(client: OpenAI) -> None:
    answer = client.responses.create(
        model=EMBEDDED, input="What is the capital of France?", temperature=0
    )
    assert answer.status == "completed"
    assert "Paris" in answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens > 0


def test_a_response_streams_the_text_it_ends_with(client: OpenAI) -> None:
    with client.responses.stream(
        model=EMBEDDED, input="What is the capital of France?", temperature=0
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == final.output_text
    assert "Paris" in final.output_text


def test_a_response_is_parsed_into_a_pydantic_model(client: OpenAI) -> None:
    answer = client.responses.parse(
        model=EMBEDDED, input="What is the capital of France?", text_format=Answer
    )
    assert isinstance(answer.output_parsed, Answer)


def test_a_stored_response_is_gone_on_with_fetched_and_deleted(client: OpenAI) -> None:
    first = client.responses.create(
        model=EMBEDDED, input="What is the capital of France?", temperature=0
    )
    second = client.responses.create(
        model=EMBEDDED, input="And of Spain?", previous_response_id=first.id, temperature=0
    )
    assert "Madrid" in second.output_text
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_response_calls_a_tool_and_reads_its_result(
    scripted_client: OpenAI, streamed: bool
) -> None:
    function = GET_WEATHER["function"] | {"type": "function"}

    def say(**asked: Any) -> Any:
        asked |= {"model": SCRIPTED, "tools": [function]}
        if not streamed:
            return scripted_client.responses.create(**asked)
        with scripted_client.responses.stream(**asked) as stream:
            return stream.get_final_response()

    first = say(input="What is the weather in San Francisco?")
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.name == "get_weather"
    assert json.loads(call.arguments) == ARGUMENTS
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = say(input=[result], previous_response_id=first.id)
    assert second.output_text == RESULT_TEXT


def test_a_prompt_is_scored_token_by_token(client: OpenAI) -> None:
    answer = client.completions.create(
        model=EMBEDDED, prompt="The capital of France", echo=True, logprobs=1, max_tokens=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])


def test_the_scripted_model_greets_where_there_are_no_tools(scripted_client: OpenAI) -> None:
    answer = scripted_client.chat.completions.create(model=SCRIPTED, messages=WEATHER)
    assert answer.choices[0].message.content == GREETING_TEXT
