"""Schemas of calls where there is little room."""

from __future__ import annotations

from typing import Any

import llguidance
import pytest

from server.protocol.tools import Function, Tool
from server.tools.brevity import MAX_ITEMS, brief


def briefed(parameters: dict[str, Any], num_tokens: int = 264) -> dict[str, Any]:
    tool = Tool(type="function", function=Function(name="f", parameters=parameters))
    return brief(tool, num_tokens).schema_


def properties(**schemas: Any) -> dict[str, Any]:
    return {"type": "object", "properties": schemas}


def test_text_without_a_bound_gets_one_that_fits() -> None:
    one = briefed(properties(a={"type": "string"}))
    assert one == {
        **properties(a={"type": "string", "maxLength": 100}),
        "additionalProperties": False,
    }
    two = briefed(properties(a={"type": "string"}, b={"type": ["string", "null"]}))
    assert [found["maxLength"] for found in two["properties"].values()] == [50, 50]
    assert briefed(properties(a={"type": "string"}), 10)["properties"]["a"]["maxLength"] == 8


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "enum": ["a"]},
        {"type": "string", "maxLength": 3},
        {"type": "string", "pattern": "a+"},
        {"type": "string", "format": "date"},
        {"type": "integer"},
        {"const": "x"},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 9},
        True,
    ],
)
def test_what_is_bounded_or_cannot_be_stays_as_it_is(schema: Any) -> None:
    assert briefed(properties(a=schema))["properties"]["a"] == schema


def test_arrays_get_a_bound_that_their_least_length_allows() -> None:
    found = briefed(properties(a={"type": "array", "items": {"type": "string"}}))["properties"]["a"]
    assert found == {
        "type": "array",
        "items": {"type": "string", "maxLength": 100 // MAX_ITEMS},
        "maxItems": MAX_ITEMS,
    }
    long = briefed(properties(a={"type": "array", "minItems": 5}))["properties"]["a"]
    assert long["maxItems"] == 5


def test_schemas_within_schemas_are_bounded_too() -> None:
    inner = {
        "$defs": {"x": {"type": "string"}},
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/x"}],
    }
    found = briefed({"type": "object", **inner, "additionalProperties": True})
    assert found["$defs"]["x"]["maxLength"] == found["anyOf"][0]["maxLength"] == 50
    assert found["additionalProperties"] is True


def test_the_narrower_schema_still_compiles() -> None:
    schema = briefed(
        properties(a={"type": ["string", "null"]}, b={"type": "array"}, c=properties(d={}))
    )
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    assert not llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar).is_error()
