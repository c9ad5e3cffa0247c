"""Calls that end in time where a context has little room.

A small model that has to fill in a schema may write on in the first string until its context is
full, and a call that is cut off is none. So there strings, arrays and objects that have no bounds
are given some: what follows the narrower schema follows the tool's own, too.
"""

from __future__ import annotations

from typing import Any

from server.protocol.tools import Tool

LITTLE_ROOM = 1024  # tokens; with more, nothing is bounded
MAX_ITEMS = 3  # of an array without a bound
_OVERHEAD = 64  # tokens of what stands around the values
_LEAST_CHARS = 8

_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPPINGS = ("properties", "$defs", "definitions")
_TEXT_BOUNDS = {"maxLength", "enum", "const", "pattern", "format"}
_OPEN_FOR_OTHERS = {"$ref", "allOf", "anyOf", "oneOf", "patternProperties", "additionalProperties"}


def brief(tool: Tool, num_tokens: int) -> Tool:
    """The tool with arguments that fit into so many tokens, as far as a schema can say that."""
    num_strings = max(1, _num_strings(tool.schema_))
    max_chars = max(_LEAST_CHARS, (num_tokens - _OVERHEAD) // (2 * num_strings))
    parameters = _bounded(tool.schema_, max_chars)
    function = tool.function.model_copy(update={"parameters": parameters})
    return tool.model_copy(update={"function": function})


def _num_strings(schema: Any) -> int:
    """How many strings without a bound an instance may have; recursion counts once."""
    if isinstance(schema, list):
        return sum(map(_num_strings, schema))
    if not isinstance(schema, dict):
        return 0
    nested = sum(_num_strings(value) for key, value in schema.items() if key != "items")
    items = _num_strings(schema.get("items")) * _count(schema.get("maxItems", MAX_ITEMS))
    return _is_open_text(schema) + nested + items


def _is_open_text(schema: dict[str, Any]) -> bool:
    kinds = schema.get("type")
    return (kinds == "string" or (isinstance(kinds, list) and "string" in kinds)) and (
        not _TEXT_BOUNDS & schema.keys()
    )


def _bounded(schema: Any, max_chars: int) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in _LISTS:
        if isinstance(found.get(key), list):
            found[key] = [_bounded(item, max_chars) for item in found[key]]
    for key in _MAPPINGS:
        if isinstance(found.get(key), dict):
            found[key] = {name: _bounded(item, max_chars) for name, item in found[key].items()}
    if _is_open_text(found):
        found["maxLength"] = max(max_chars, _count(found.get("minLength")))
    if "items" in found or found.get("type") == "array":
        found["items"] = _bounded(found.get("items", {}), max_chars)
        found.setdefault("maxItems", max(MAX_ITEMS, _count(found.get("minItems"))))
    if found.get("properties") and not _OPEN_FOR_OTHERS & found.keys():
        found["additionalProperties"] = False
    return found


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
