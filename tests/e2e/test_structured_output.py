"""Structured output from the real model in its worker process, hostile schemas beside it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest

from tests.e2e.serving import Served
from tests.grammar.test_compiler import HOSTILE

pytestmark = pytest.mark.slow

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
        "is_capital": {"type": "boolean"},
    },
    "required": ["city", "population", "is_capital"],
    "additionalProperties": False,
}


def post(demo: Served, **body: Any) -> httpx.Response:
    body = {"messages": CAPITAL, "temperature": 0} | body
    return httpx.post(f"{demo.url}/v1/chat/completions", json=body, timeout=120)


def test_openais_client_gets_what_its_schema_asks_for(demo: Served) -> None:
    client = openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0)
    named = {"name": "city", "schema": CITY, "strict": True}
    for seed in range(4):
        reply = client.chat.completions.create(
            model="skipllm-demo",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            response_format={"type": "json_schema", "json_schema": named},  # type: ignore[typeddict-item]
            temperature=seed / 2,
            seed=seed,
            max_tokens=150,
        )
        assert reply.choices[0].finish_reason == "stop"
        jsonschema_rs.validate(CITY, json.loads(reply.choices[0].message.content or ""))
        assert reply.usage is not None
        assert reply.usage.model_extra is not None
        assert reply.usage.model_extra["skip"]["total_ffn_blocks"] > 0


def test_a_choice_is_one_of_those_given(demo: Served) -> None:
    reply = post(demo, guided_choice=["Paris", "London"])
    assert reply.json()["choices"][0]["message"]["content"] == "Paris"


def test_hostile_grammars_cost_their_own_requests_and_nothing_else(demo: Served) -> None:
    golden = post(demo).json()["choices"]
    worker = demo.worker()

    def send(grammar: str) -> httpx.Response:
        field: dict[str, Any] = {"grammar": grammar}
        if grammar.startswith("{"):
            schema = grammar.removeprefix('{"grammars": [{"json_schema": ').removesuffix("}]}")
            field = {"guided_json": schema}
        return post(demo, max_tokens=5, **field)

    with ThreadPoolExecutor(4) as senders:
        replies = list(senders.map(send, HOSTILE.values()))
    for name, reply in zip(HOSTILE, replies, strict=True):
        assert reply.status_code in (200, 400), (name, reply.text)
        assert len(reply.content) < 4096
    assert 400 in {reply.status_code for reply in replies}
    assert post(demo).json()["choices"] == golden
    assert demo.metric("skipllm_requests_running") == 0
    assert demo.worker() == worker, "it has died, and was replaced"
