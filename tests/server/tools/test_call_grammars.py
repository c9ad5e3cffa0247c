"""What the grammars of calls let through, judged by llguidance itself."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from server.protocol.tools import Function, Tool
from server.tools.call_grammars import calls_in_text, calls_only, perhaps_after_reasoning
from server.tools.families import HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED, Call, Family
from server.tools.grammars import json_grammar
from skipllm_core.tokenizer import ByteTokenizer

WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "maxLength": 20}},
}
ADD = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FAMILIES = [HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED]


def tool(name: str, parameters: dict[str, Any], *, strict: bool | None = None) -> Tool:
    function = Function(name=name, parameters=parameters, strict=strict)
    return Tool(type="function", function=function)


class Said(Call):
    def __init__(self, name: str, arguments: str) -> None:
        self._name, self._arguments = name, arguments

    @property
    def name(self) -> str:
        return self._name

    @property
    def arguments(self) -> str:
        return self._arguments


WEATHER_IN_PARIS = Said("weather", '{"city": "Paris"}')
WEATHER_OF_NOTHING = Said("weather", '{"city": 1}')
ONE = Said("add", '{"a": 1}')
WEATHER_TOOL, ADD_TOOL = tool("weather", WEATHER, strict=True), tool("add", ADD)


def follows(grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.fixture(params=FAMILIES, ids=lambda family: family.head[:12])
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def test_where_a_call_is_required_there_is_nothing_else(family: Family) -> None:
    grammar = calls_only(ByteTokenizer(), family, [WEATHER_TOOL, ADD_TOOL], is_single=False)
    for calls in ([ONE], [WEATHER_IN_PARIS], [ONE, WEATHER_IN_PARIS]):
        assert follows(grammar, family.write(calls))
    for text in ("", "Hello", f"Well: {family.write([ONE])}", f"{family.write([ONE])} Done."):
        assert not follows(grammar, text)
    for call in (WEATHER_OF_NOTHING, Said("add", "{}"), Said("other", "{}"), Said("add", '{"a"')):
        assert not follows(grammar, family.write([call]))


def test_a_single_call_is_not_followed_by_another(family: Family) -> None:
    grammar = calls_only(ByteTokenizer(), family, [ADD_TOOL], is_single=True)
    assert follows(grammar, family.write([ONE]))
    assert not follows(grammar, family.write([ONE, ONE]))


def test_strict_calls_in_text_follow_their_schema(family: Family) -> None:
    grammar = calls_in_text(ByteTokenizer(), family, [WEATHER_TOOL, ADD_TOOL], is_single=False)
    paris = family.write([WEATHER_IN_PARIS])
    for text in ("", "Hello {", "See <tool", f"Let me see. {paris}", f"{paris} and then {paris}"):
        assert follows(grammar, text), text
    for said in (WEATHER_OF_NOTHING, Said("other", "{}")):
        assert not follows(grammar, f"Let me see. {family.write([said])}")


def test_what_is_not_strict_need_only_be_json(family: Family) -> None:
    grammar = calls_in_text(ByteTokenizer(), family, [WEATHER_TOOL, ADD_TOOL], is_single=False)
    assert follows(grammar, family.write([Said("add", '{"a": "x", "b": []}')]))
    assert not follows(grammar, family.write([Said("add", "{a}")]))


def test_text_or_one_call_and_then_the_end(family: Family) -> None:
    grammar = calls_in_text(ByteTokenizer(), family, [WEATHER_TOOL], is_single=True)
    assert follows(grammar, "Hello")
    assert follows(grammar, f"Hello {family.write([WEATHER_IN_PARIS])}")
    assert not follows(grammar, f"{family.write([WEATHER_IN_PARIS])} Hello")


def test_a_strict_call_without_its_tags_follows_the_schema_too() -> None:
    grammar = calls_in_text(ByteTokenizer(), HERMES, [WEATHER_TOOL, ADD_TOOL], is_single=False)
    assert follows(grammar, '\n{"name": "weather", "arguments": {"city": "Paris"}}')
    assert follows(grammar, '{"name":\n"add", "arguments": {}}')
    assert follows(grammar, '```json\n{"name": "weather", "arguments": {"city": "Paris"}}')
    assert follows(grammar, '```json\n{"city": 1}\n```')
    assert not follows(grammar, '```\n{"name": "weather", "arguments": {"city": 1}}')
    assert not follows(grammar, '{"name": "weather", "arguments": {"city": 1}}')
    assert not follows(grammar, '{ "name": "other"}')


def test_an_answer_after_a_schema_may_be_a_call_instead(family: Family) -> None:
    person = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    grammar = calls_only(
        ByteTokenizer(), family, [WEATHER_TOOL], is_single=False, content=json_grammar(person)
    )
    assert follows(grammar, '{"name": "Ann", "age": 7}')
    assert follows(grammar, '{"name": "weather", "age": 7}')
    assert follows(grammar, family.write([WEATHER_IN_PARIS]))
    for text in ("Hello", '{"name": "Ann"}', family.write([WEATHER_OF_NOTHING])):
        assert not follows(grammar, text), text


def test_a_schema_that_is_not_strict_may_say_what_nobody_can_keep_to() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "phone"}}}
    grammar = calls_only(ByteTokenizer(), HERMES, [tool("odd", odd)], is_single=True)
    assert follows(grammar, HERMES.write([Said("odd", '{"a": "12"}')]))


def test_reasoning_before_is_free(family: Family) -> None:
    calls = calls_only(ByteTokenizer(), family, [ADD_TOOL], is_single=True)
    for inner in (calls, json_grammar(ADD)):
        said = family.write([ONE]) if inner is calls else '{"a": 1}'
        grammar = perhaps_after_reasoning(ByteTokenizer(), inner)
        for text in (said, f"<think>\nWhat {{ is\n</think>\n\n{said}", f"\n<think></think>{said}"):
            assert follows(grammar, text), text
        for text in ("<think>", "<think>x</think>", f"Well {said}", f"<think>x</think>Well {said}"):
            assert not follows(grammar, text)


def test_grammars_are_one_line_for_each_rule_whatever_the_schema_says() -> None:
    schema = {"type": "object", "properties": {"a\nb\u2028": {"const": "/\n\"'{"}}}
    grammar = calls_only(ByteTokenizer(), HERMES, [tool("odd", schema)], is_single=True)
    said = Said("odd", json.dumps({"a\nb\u2028": "/\n\"'{"}, ensure_ascii=False))
    assert follows(grammar, HERMES.write([said]))
