"""What is wrong with a grammar, and where in a schema."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from llguidance import LLMatcher

from skipllm_core.grammar.vocabulary import Vocabulary

MAX_MESSAGE_CHARS = 300
MAX_READ_CHARS = 4096
SEARCH_LIMIT_S = 0.3

# Keywords whose value is a schema, holds schemas by name, or lists them.
_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_NAMED = ("properties", "patternProperties", "dependentSchemas")
_LISTED = ("prefixItems", "anyOf", "allOf", "oneOf")
_SHARED = ("$schema", "$defs", "definitions", "x-guidance")  # what a part needs of the whole


def explain(error: str, text: str, vocabulary: Vocabulary) -> str:
    """llguidance's error about the grammar `text`, for its author."""
    error = _cause(error)
    message = _worded(error)
    for schema in _schemas_in(text):
        if _error_in(schema, vocabulary) == error:
            place = _place(schema, error, vocabulary)
            return f"at {place}: {message}" if place else message
    return message


# llguidance's error about a schema in a Lark grammar: where it stands, what it is, an excerpt.
_IN_LARK = re.compile(
    r"at \d+\(\d+\): failed to compile JSON schema: (.*?)(?:\n +\d+ \| .*)?", re.S
)


def _cause(error: str) -> str:
    """Without what differs with where one begins to read: the reference that led to it, and the
    grammar around it. Of a long one, its beginning: some quote the whole text."""
    error = error[:MAX_READ_CHARS]
    if found := _IN_LARK.fullmatch(error):
        error = found[1]
    return re.sub(r"\s?while processing json-schema:\S*", "", error)


def _worded(error: str) -> str:
    if found := re.match(r'Unimplemented keys: \["([^"\\]*)"', error):
        return f"the keyword '{found[1]}' is not supported"
    if error.startswith("NoExtension"):
        return "no text can follow it"
    if "not present in a registry" in error:
        return "references to other documents are not followed: " + error.split(" is not ")[0]
    words = " ".join(error.split())
    return words if len(words) <= MAX_MESSAGE_CHARS else words[:MAX_MESSAGE_CHARS] + "..."


def _schemas_in(text: str) -> Iterator[dict[str, Any]]:
    grammars: list[dict[str, Any]] = [{"lark_grammar": text}]
    if text.lstrip().startswith("{"):
        try:
            grammars = json.loads(text)["grammars"]
        except (ValueError, KeyError, RecursionError):
            return
    for grammar in grammars:
        if isinstance(schema := grammar.get("json_schema"), dict):
            yield schema
        if isinstance(lark := grammar.get("lark_grammar"), str):
            yield from _schemas_in_lark(lark)


def _schemas_in_lark(lark: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    for begin in re.finditer(r"%json\s*(?=\{)", lark):
        try:
            schema, _ = decoder.raw_decode(lark, begin.end())
        except (ValueError, RecursionError):
            continue
        yield schema


def _error_in(schema: Mapping[str, Any], vocabulary: Vocabulary) -> str:
    text = json.dumps({"grammars": [{"json_schema": schema}]})
    is_error, messages = LLMatcher.validate_grammar_with_warnings(text, vocabulary.tokenizer)
    return _cause(messages[0]) if is_error else ""


def _place(root: Mapping[str, Any], error: str, vocabulary: Vocabulary) -> str:
    """The innermost part that has the error by itself, as a path."""
    shared = {key: root[key] for key in _SHARED if key in root}
    deadline_s = time.monotonic() + SEARCH_LIMIT_S
    path, node, seen = "", root, set()
    while True:
        for step, part in _parts(node, root):
            if time.monotonic() > deadline_s:
                return path
            if step not in seen and _error_in({**shared, **part}, vocabulary) == error:
                is_reference = step.startswith("#")
                path = step[2:].replace("/", ".") if is_reference else f"{path}.{step}".lstrip(".")
                seen.add(step if is_reference else None)
                node = part
                break
        else:
            return path


def _parts(
    schema: Mapping[str, Any], root: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas directly within one, and what it refers to: how they are reached, and they."""
    places = [(key, schema.get(key)) for key in _ONE]
    for key in _NAMED:
        if isinstance(named := schema.get(key), dict):
            places += [(f"{key}.{name}", part) for name, part in named.items()]
    for key in _LISTED:
        if isinstance(listed := schema.get(key), list):
            places += [(f"{key}[{index}]", part) for index, part in enumerate(listed)]
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for name in reference[2:].split("/"):
            target = target.get(name) if isinstance(target, dict) else None
        places.append((reference, target))
    yield from ((step, part) for step, part in places if isinstance(part, dict))
