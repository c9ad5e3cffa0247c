"""LiteLLM, which sits between many applications and their servers."""

import json
import os
from typing import Any, Literal

import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.clients.scripted import ARGUMENTS, GREETING_TEXT
from tests.e2e.serving import Served

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
import litellm

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}},
            "required": ["location"],
        },
    },
}


class Answer(BaseModel):
    city: Literal["Berlin", "Paris", "Rome"]


def at(served: Served, model: str, provider: str = "openai") -> dict[str, Any]:
    return {
        "model": f"{provider}/{model}",
        "api_base": f"{served.url}/v1",
        "api_key": "none",
        "num_retries": 0,
    }


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_a_completion_is_answered(embedded: Served, provider: str) -> None:
    answer = litellm.completion(
        **at(embedded, "skipllm-demo", provider), messages=FRANCE, temperature=0
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


async def test_a_completion_streams(embedded: Served) -> None:
    async with AsyncOpenAI(base_url=f"{embedded.url}/v1", api_key="none") as client:
        stream = await litellm.acompletion(
            **at(embedded, "skipllm-demo"),
            messages=FRANCE,
            temperature=0,
            stream=True,
            client=client,  # its own is never closed
        )
        chunks = [chunk async for chunk in stream]
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called(scripted: Served, streamed: bool) -> None:
    answer = litellm.completion(
        **at(scripted, "scripted"), messages=FRANCE, tools=[GET_WEATHER], stream=streamed
    )
    if streamed:
        answer = litellm.stream_chunk_builder(list(answer), messages=FRANCE)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == ARGUMENTS


def test_a_pydantic_model_is_enforced(embedded: Served) -> None:
    answer = litellm.completion(
        **at(embedded, "skipllm-demo", "hosted_vllm"), messages=FRANCE, response_format=Answer
    )
    Answer.model_validate_json(answer.choices[0].message.content)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_response_is_answered(scripted: Served, streamed: bool) -> None:
    answer = litellm.responses(**at(scripted, "scripted"), input="Hello!", stream=streamed)
    if streamed:
        answer = list(answer)[-1].response
    assert answer.output[0].content[0].text == GREETING_TEXT


def test_an_anthropic_message_is_answered(scripted: Served) -> None:
    answer = litellm.completion(
        model="anthropic/scripted",
        api_base=scripted.url,
        api_key="none",
        messages=FRANCE,
        max_tokens=40,
    )
    assert answer.choices[0].message.content == GREETING_TEXT


def test_a_prompt_beyond_the_context_is_known_as_one(embedded: Served) -> None:
    long = [{"role": "user", "content": "What is the capital of France? " * 200}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**at(embedded, "skipllm-demo"), messages=long)
