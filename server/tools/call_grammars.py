"""Grammars of answers with calls: what `tool_choice` and `strict` promise."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.protocol.tools import Tool
from server.tools import reasoning
from server.tools.families import LLAMA3_JSON, Family
from server.tools.grammars import ANY_OBJECT, TEXT, bounded, grammars_in, literal, marker
from skipllm_core.tokenizer import Tokenizer

MAX_CALLS = 16  # of one answer that may have nothing else: a small model may find no end


def calls_only(
    tokenizer: Tokenizer,
    family: Family,
    tools: Sequence[Tool],
    *,
    is_single: bool,
    content: str | None = None,
) -> str:
    """Calls, each after its tool's schema; or else an answer that follows the grammar `content`."""
    if family is LLAMA3_JSON:  # all of it is JSON, as content may be
        heads = [""] * len(tools)
        rules = _rules(tokenizer, heads, [_call_schema(tool) for tool in tools], "")
    else:
        heads = [family.head_of(tool.name) for tool in tools]
        rules = _rules(tokenizer, heads, [_schema(tool) for tool in tools], family.tail)
    begin, separator, end = (
        _elements(tokenizer, text) for text in (family.begin, family.separator, family.end)
    )
    more = "" if is_single else f"({separator} call){{0,{MAX_CALLS - 1}}}"
    rules.insert(0, f"calls: {begin} call {more} {end}")
    if content is None:
        return "\n".join(("start: calls", *rules))
    lark = "\n".join(("start: calls | @content", *rules))
    first, *others = grammars_in(content)
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**first, "name": "content"}, *others]})


def calls_in_text(
    tokenizer: Tokenizer, family: Family, tools: Sequence[Tool], *, is_single: bool
) -> str:
    """Any text. A call that begins in it is one of the tools', and follows the schemas of those
    that are strict."""
    opening = marker(tokenizer, family.opening)
    if opening.startswith('"'):
        opening = f"opening[lazy]: TEXT /{family.trigger}/"
    else:  # a special token, which no text contains
        opening = f"opening: TEXT {opening}"
    heads = [family.head_of(tool.name) for tool in tools]
    schemas = [_schema(tool) if tool.function.strict else ANY_OBJECT for tool in tools]
    calls = "opening call"
    if family.begin:
        begin, separator, end = (
            _elements(tokenizer, text)
            for text in (family.begin.removeprefix(family.opening), family.separator, family.end)
        )
        more = "" if is_single else f"({separator} call)*"
        calls = f"opening {begin} call {more} {end}"
    else:
        heads = [head.removeprefix(family.opening) for head in heads]
    rules = _rules(tokenizer, heads, schemas, family.tail)
    start = "TEXT | calls" if is_single else "calls* TEXT"
    if family.bare_trigger is not None:
        start += " | bare"
        rules += _bare_rules(family.bare_trigger, tools)
    return "\n".join((f"start: {start}", f"calls: {calls}", opening, *rules, f"TEXT: {TEXT}"))


def _bare_rules(trigger: str, tools: Sequence[Tool]) -> list[str]:
    """A call without its family's marks, which only begins an answer."""
    calls = [
        f"{literal(tool.name + _QUOTED_ARGUMENTS)} json{index}" for index, tool in enumerate(tools)
    ]
    return [
        f'bare: bare_opening ({" | ".join(calls)}) "}}"',
        f"bare_opening[lazy]: /[ \\n]*{trigger}/",
    ]


_QUOTED_ARGUMENTS = '", "arguments": '


def perhaps_after_reasoning(tokenizer: Tokenizer, grammar: str) -> str:
    """What `grammar` describes, at once or behind a block of reasoning."""
    begin, end = (marker(tokenizer, text) for text in reasoning.MARKERS)
    first, *others = grammars_in(grammar)
    name = f"answer{len(others) + 1}"  # nested ones have fewer
    lark = "\n".join(
        (
            f"start: (SPACE {begin} free SPACE)? @{name}",
            f"free[suffix={end}]: TEXT" if end.startswith('"') else f"free: TEXT {end}",
            f"TEXT: {TEXT}",
            r"SPACE: /[ \n\r\t]{0,8}/",
        )
    )
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**first, "name": name}, *others]})


def _rules(
    tokenizer: Tokenizer, heads: Sequence[str], schemas: Sequence[Mapping[str, Any]], tail: str
) -> list[str]:
    """The rule `call` and what it is made of: a head, JSON after its schema, and the tail."""
    indices = range(len(heads))
    rules = [f"call: {' | '.join(f'call{index}' for index in indices)}"]
    end = _elements(tokenizer, tail)
    for index, head, schema in zip(indices, heads, schemas, strict=True):
        rules.append(f"call{index}: {_elements(tokenizer, head)} json{index} {end}")
        rules.append(f"json{index}: %json {json.dumps(bounded(schema))}")
    return rules


def _elements(tokenizer: Tokenizer, text: str) -> str:
    """The text as a rule matches it: a family's markers one by one."""
    parts = re.split(r"(<[a-z_|/]+>|\[[A-Z_]+\])", text)
    return " ".join(marker(tokenizer, part) for part in parts if part)


def _schema(tool: Tool) -> dict[str, Any]:
    """The arguments' schema. If it is not strict, it is kept to as far as it can be."""
    if tool.function.strict:
        return tool.schema_
    return {**tool.schema_, "x-guidance": {"lenient": True}}


def _call_schema(tool: Tool) -> dict[str, Any]:
    """A whole call of Llama's as a schema."""
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.name},
            "parameters": _moved(tool.schema_, "#/properties/parameters"),
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
        "x-guidance": {"lenient": not tool.function.strict},
    }


def _moved(schema: Any, root: str) -> Any:
    """A schema with its references as they are when it stands at `root` of another."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value.removeprefix("#")
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for key, value in schema.items()
    }
