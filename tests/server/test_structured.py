"""Structured output in every wire form, and what becomes of a bad one."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from typing import Any

import jsonschema_rs
import orjson
import pytest

from skipllm_core.sequence import Sequence
from skipllm_core.tokenizer import ByteTokenizer
from skipllm_core.types import MAX_GRAMMAR_BYTES
from tests.fakes import count_up
from tests.grammar.texts import allowed
from tests.server.conftest import Server, running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
GBNF = 'root ::= animal "s"?\nanimal ::= "cat" | "dog"'
LARK = "start: /[0-9]{4}/"


def drawn(seq: Sequence) -> int:
    """A token that follows from the text so far, of those that the grammar allows."""
    if seq.grammar is None:
        return count_up(seq)
    mask = seq.grammar.mask()
    if seq.grammar.error is not None:
        return ByteTokenizer.EOS
    return random.Random(f"{seq.params.seed} {seq.output_ids}").choice(allowed(mask))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running(drawn, max_model_len=400) as server:
        yield server


def fits_schema(text: str) -> bool:
    return bool(jsonschema_rs.is_valid(SCHEMA, json.loads(text)))


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


NAMED = {"name": "answer", "schema": SCHEMA, "strict": True}
FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, fits_schema),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, fits_schema),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, fits_schema),
    ({"structured_outputs": {"json": SCHEMA}}, fits_schema),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, fits_schema),
    ({"structured_outputs": {"regex": "[a-c]{3}"}}, re.compile("[a-c]{3}").fullmatch),
    ({"structured_outputs": {"choice": ["yes", 'n"o', "né"]}}, ("yes", 'n"o', "né").__contains__),
    ({"structured_outputs": {"grammar": GBNF}}, re.compile("(cat|dog)s?").fullmatch),
    ({"structured_outputs": {"grammar": LARK}}, re.compile("[0-9]{4}").fullmatch),
    ({"guided_json": SCHEMA}, fits_schema),
    ({"guided_json": json.dumps(SCHEMA)}, fits_schema),
    ({"guided_regex": r"^\d{2}/x$"}, re.compile(r"\d\d/x").fullmatch),
    ({"guided_choice": ["a", "ab", ""]}, ("a", "ab", "").__contains__),
    ({"guided_grammar": LARK}, re.compile("[0-9]{4}").fullmatch),
    ({"json_schema": SCHEMA}, fits_schema),
    ({"grammar": GBNF}, re.compile("(cat|dog)s?").fullmatch),
]


@pytest.mark.parametrize(("body", "fits"), FORMS, ids=lambda v: str(v)[:50])
async def test_every_form_is_kept_to_by_both_endpoints(
    server: Server, body: dict[str, Any], fits: Any
) -> None:
    for seed in range(3):
        chat = await server.chat(seed=seed, **body)
        assert chat.status_code == 200, chat.text
        choice = chat.json()["choices"][0]
        assert fits(choice["message"]["content"]), choice
        assert choice["finish_reason"] == "stop"
        text = await server.complete(seed=seed, max_tokens=300, **body)
        assert fits(text.json()["choices"][0]["text"]), text.text


async def test_the_vaguest_form_gives_an_object(server: Server) -> None:
    reply = await server.chat(
        structured_outputs={"json_object": True, "disable_any_whitespace": True},
        seed=4,
        max_tokens=300,
    )
    choice = reply.json()["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert is_object(choice["message"]["content"])


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
        {"grammar": ""},
        {"response_format": None, "guided_json": None, "guided_decoding_backend": "auto"},
    ],
    ids=str,
)
async def test_a_form_that_asks_for_nothing_changes_nothing(
    server: Server, body: dict[str, Any]
) -> None:
    plain = await server.chat(max_tokens=9)
    reply = await server.chat(max_tokens=9, **body)
    assert reply.json()["choices"] == plain.json()["choices"]


async def test_every_choice_follows_the_one_grammar(server: Server) -> None:
    reply = await server.chat(n=5, guided_json=SCHEMA, seed=1)
    texts = [choice["message"]["content"] for choice in reply.json()["choices"]]
    assert all(map(fits_schema, texts))
    assert len(set(texts)) > 1


async def test_a_stream_joins_to_what_a_whole_answer_is(server: Server) -> None:
    body = {"guided_json": SCHEMA, "seed": 3}
    whole = (await server.chat(**body)).json()["choices"][0]["message"]["content"]
    streamed = (await server.chat(stream=True, **body)).text
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in streamed.splitlines()
        if line.startswith("data: {")
    ]
    joined = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert joined == whole
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_ignore_eos_does_not_keep_a_complete_answer_from_ending(server: Server) -> None:
    reply = await server.complete(guided_choice=["a"], ignore_eos=True, min_tokens=5, max_tokens=20)
    assert reply.json()["choices"][0]["text"] == "a"
    assert reply.json()["usage"]["completion_tokens"] == 1


async def test_a_stop_string_still_cuts(server: Server) -> None:
    reply = await server.chat(guided_regex="abcdef", stop="d")
    assert reply.json()["choices"][0]["message"]["content"] == "abc"


# Refusals -----------------------------------------------------------------------------------------


def error_of(reply: Any, status: int = 400) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


TWO = [
    ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_json", "guided_regex"),
    (
        {"response_format": {"type": "json_object"}, "grammar": GBNF},
        "response_format",
        "grammar",
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "choice": ["a"]}},
        "structured_outputs.json",
        "structured_outputs.choice",
    ),
]


@pytest.mark.parametrize(("body", "first", "second"), TWO, ids=lambda v: str(v)[:40])
async def test_two_forms_in_one_request_are_refused_by_name(
    server: Server, body: dict[str, Any], first: str, second: str
) -> None:
    error = error_of(await server.chat(**body))
    assert first in error["message"]
    assert second in error["message"]
    assert error["param"] == second


NOT = {"properties": {"a": {"items": {"not": {}}}}}
BAD: list[tuple[dict[str, Any], str, str]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": NOT}}},
        "response_format.json_schema.schema",
        "at properties.a.items: the keyword 'not' is not supported",
    ),
    ({"guided_json": {"type": "strin"}}, "guided_json", "Invalid type: strin"),
    ({"guided_json": {"$ref": "http://localhost/"}}, "guided_json", "not followed"),
    ({"guided_json": {"$ref": "#"}}, "guided_json", "no text can follow it"),
    ({"guided_json": "{"}, "guided_json", "a JSON Schema"),
    ({"guided_json": [1]}, "guided_json", "a JSON Schema"),
    ({"guided_json": True}, "guided_json", "a JSON Schema"),
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_regex": r"a(?=b)"}, "guided_regex", "look"),
    ({"guided_choice": []}, "guided_choice", "empty array"),
    ({"guided_choice": [1]}, "guided_choice[0]", "a string"),
    ({"guided_choice": ["a" * MAX_GRAMMAR_BYTES]}, "guided_choice", "larger than"),
    ({"grammar": "root ::= nothing"}, "grammar", "nothing"),
    ({"grammar": "start: nothing"}, "grammar", "nothing"),
    ({"grammar": "a" * 40_000}, "grammar", "at most"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", ""),
    ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "Unknown"),
    ({"structured_outputs": "x"}, "structured_outputs", "an object"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {}}, "response_format.type", "Missing"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "Missing",
    ),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD, ids=lambda v: str(v)[:50])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_form_is_named_before_the_first_byte(
    server: Server, body: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    error = error_of(await server.chat(stream=stream, **body))
    assert error["param"] == param
    assert message in error["message"]
    assert (await server.chat(max_tokens=2)).status_code == 200
    assert server.engine.num_unfinished == 0


@pytest.mark.parametrize("depth", [200, 900, 3000])
async def test_a_deep_schema_is_refused(server: Server, depth: int) -> None:
    schema = b'{"items":' * depth + b"{}" + b"}" * depth
    messages = orjson.dumps([{"role": "user", "content": "hi"}])
    for schema_text in (schema, orjson.dumps(schema.decode())):
        reply = await server.http.post(
            CHAT,
            content=b'{"messages":' + messages + b',"guided_json":' + schema_text + b"}",
            headers={"content-type": "application/json"},
        )
        assert error_of(reply)


async def test_a_schema_of_a_megabyte_is_refused(server: Server) -> None:
    error = error_of(await server.chat(guided_json={"enum": ["x" * 2**20]}))
    assert str(MAX_GRAMMAR_BYTES) in error["message"]
    assert len(error["message"]) < 200


async def test_other_answers_go_on_beside_bad_grammars(server: Server) -> None:
    alone = (await server.chat("victim", max_tokens=60)).json()["choices"]
    replies = await asyncio.gather(
        server.chat("victim", max_tokens=60),
        *(server.chat(**body) for body, _, _ in BAD if "guided_json" in body),
        server.chat(guided_json=SCHEMA),
    )
    assert replies[0].json()["choices"] == alone
    assert all(reply.status_code == 400 for reply in replies[1:-1])
    assert replies[-1].status_code == 200


async def test_the_metrics_count_a_bad_grammar_as_the_clients_fault(server: Server) -> None:
    await server.chat(guided_json={"type": "strin"})
    metrics = (await server.http.get("/metrics")).text
    counted = r'skipllm_requests_total\{[^}]*finish_reason="error"[^}]*status="400"\} 1'
    assert re.search(counted, metrics)
