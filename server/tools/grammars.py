"""Every wire form of structured output as one grammar for the engine (`SamplingParams.grammar`).

A grammar is llguidance's: Lark with its extensions, or its JSON, `{"grammars": [...]}`, whose first
is the answer's and whose others are named (`@name`). It describes the whole answer. The worker
compiles it; here only text is made of text.

What is true of llguidance as the worker uses it:

- Its vocabulary is made of our tokenizer's bytes, and a token is special there if it is in the
  tokenizer. Added tokens that are not (Qwen's `<tool_call>`) are bytes as all others: a literal
  "<tool_call>" matches the one token and its text spelled out, and so does free text.
- Special tokens (Llama's <|python_tag|>) match no literal and no regex. A rule names them by id:
  `<[128010]>`. `marker` writes whichever of the two a tokenizer needs.
- Bytes that a grammar leaves no choice about are forced, in the tokenizer's own split.
- `rule[lazy]: TEXT "mark"` ends at the first "mark": what follows in the grammar has to follow
  there. So calls within free text, kept to their schema, are

      start: call* rest
      rest: TEXT
      call: trigger %json {...} "</tool_call>"
      trigger[lazy]: TEXT "<tool_call>"
      TEXT: /(.|\\n)*/

- `%json` takes a schema as it is. Keywords that it does not know how to keep are errors, and so are
  references to elsewhere; what says nothing (`title`, `default`) is skipped.
- An answer that is complete ends at once, with "stop": no end-of-sequence token is waited for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import llguidance

from server.protocol.base import GenerationRequest
from server.protocol.structured import ResponseFormat, StructuredOutputs
from server.tools import gbnf
from skipllm_core.errors import InvalidRequestError
from skipllm_core.tokenizer import Tokenizer
from skipllm_core.types import MAX_GRAMMAR_BYTES

# Of grammars in llama.cpp's language, which are translated here: some 50 ms of it at most.
MAX_GBNF_BYTES = 16 * 1024
MAX_GBNF_RULES = 256

# Between the tokens of JSON: what pretty-printing needs, and no more, as a small model may write
# spaces without end.
WHITESPACE = r"( |\r?\n[ \t]{0,32})"

ANY_OBJECT: dict[str, Any] = {"type": "object"}
TEXT = r"/(.|\n)*/"

FORMATS = frozenset(
    {
        "date", "date-time", "duration", "email", "hostname", "idn-email", "idn-hostname", "ipv4",
        "ipv6", "iri", "iri-reference", "json-pointer", "regex", "relative-json-pointer", "time",
        "uri", "uri-reference", "uri-template", "uuid",
    }
)  # fmt: skip
# Keywords whose value is a schema, holds schemas by name, or lists them.
_SINGLE = frozenset({"additionalProperties", "items"})
_NAMED = frozenset({"$defs", "definitions", "patternProperties", "properties"})
_LISTED = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer has to follow, and the request's field that says so."""

    grammar: str
    param: str


def constraint_of(request: GenerationRequest) -> Constraint | None:
    """The grammar that the request asks for. Raises InvalidRequestError if it asks for two, or for
    what is too long or no grammar at all; most faults are found when it is compiled."""
    wishes = list(_wishes(request))
    if len(wishes) > 1:
        first, second = wishes[0].param, wishes[1].param
        raise _refusal(second, f"'{first}' and '{second}' exclude each other")
    return wishes[0] if wishes else None


def _wishes(request: GenerationRequest) -> Iterator[Constraint]:
    vllm = request.structured_outputs or StructuredOutputs.model_validate({})
    vllm_spaces = "" if vllm.disable_any_whitespace else vllm.whitespace_pattern
    if request.response_format is not None:
        yield from _response_format(request.response_format)
    schemas = (
        ("structured_outputs.json", vllm.json_, vllm_spaces),
        ("structured_outputs.json_object", ANY_OBJECT if vllm.json_object else None, vllm_spaces),
        ("guided_json", request.guided_json, request.guided_whitespace_pattern),
        ("json_schema", request.json_schema, None),
    )
    yield from (
        _json(schema, name, spaces) for name, schema, spaces in schemas if schema is not None
    )
    texts = (
        ("structured_outputs.regex", vllm.regex, _regex),
        ("structured_outputs.grammar", vllm.grammar, _grammar),
        ("guided_regex", request.guided_regex, _regex),
        ("guided_grammar", request.guided_grammar, _grammar),
        ("grammar", request.grammar or None, _grammar),  # llama.cpp's clients send "" for none
    )
    yield from (make(text, name) for name, text, make in texts if text is not None)
    choices = (
        ("structured_outputs.choice", vllm.choice),
        ("guided_choice", request.guided_choice),
    )
    yield from (_choice(choice, name) for name, choice in choices if choice is not None)


def _response_format(wanted: ResponseFormat) -> Iterator[Constraint]:
    name = "response_format"
    if wanted.type == "json_schema" and wanted.json_schema is not None:
        yield _json(wanted.json_schema.schema_, f"{name}.json_schema.schema")
    elif wanted.type != "text" and wanted.schema_ is not None:
        yield _json(wanted.schema_, f"{name}.schema")
    elif wanted.type != "text":
        yield _json(ANY_OBJECT, name)


def _json(schema: dict[str, Any], param: str, whitespace: str | None = None) -> Constraint:
    try:
        grammar = json_grammar(schema, whitespace)
    except RecursionError:
        raise _refusal(param, "nested too deeply") from None
    return checked(grammar, param)


def _regex(regex: str, param: str) -> Constraint:
    return checked(llguidance.LLMatcher.grammar_from_regex(regex), param)


def _choice(choices: list[str], param: str) -> Constraint:
    # One terminal: thousands of alternatives are dear in a rule, and cheap in a regex.
    return checked("start: CHOICE\nCHOICE: " + " | ".join(map(literal, choices)), param)


def _grammar(text: str, param: str) -> Constraint:
    """Lark as it is; anything else is taken for GBNF."""
    checked(text, param)  # its length
    if gbnf.is_gbnf(text):
        if len(text) > MAX_GBNF_BYTES or text.count("::=") > MAX_GBNF_RULES:
            raise _refusal(param, f"at most {MAX_GBNF_BYTES} bytes and {MAX_GBNF_RULES} rules")
        try:
            text = gbnf.lark_of(text)
        except Exception as error:  # the translation raises nothing narrower
            reason = str(error)[:200]
            raise _refusal(param, f"no GBNF and no Lark grammar: {reason}") from None
    return checked(text, param)


def checked(grammar: str, param: str) -> Constraint:
    if len(grammar.encode()) > MAX_GRAMMAR_BYTES:
        raise _refusal(param, f"larger than {MAX_GRAMMAR_BYTES} bytes")
    return Constraint(grammar, param)


# Parts that grammars are made of -----------------------------------------------------------------


def json_grammar(schema: Mapping[str, Any], whitespace: str | None = None) -> str:
    """The grammar of the JSON texts that a schema describes. `whitespace`, a regex, is what may
    stand between two tokens; an empty one allows none."""
    return json.dumps({"grammars": [{"json_schema": bounded(schema, whitespace)}]})


def bounded(schema: Mapping[str, Any], whitespace: str | None = None) -> dict[str, Any]:
    """The schema for `%json`, with a bound on whitespace unless it says itself what is allowed."""
    options: dict[str, Any] = {"whitespace_pattern": whitespace or WHITESPACE}
    if whitespace == "":
        options = {"whitespace_flexible": False}
    given = schema.get("x-guidance")
    options |= given if isinstance(given, dict) else {}
    # With a name of its own a schema's references to itself would be taken for another document's.
    nameless = {key: value for key, value in schema.items() if key not in ("$id", "id")}
    return {**_without_private_formats(nameless), "x-guidance": options}


def _without_private_formats(schema: Any) -> Any:
    """A schema without the formats that JSON Schema does not define ("password", "path", "int32"):
    they are notes, which say nothing of the text. One that it does define is kept, or refused."""
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if key in _NAMED and isinstance(value, dict):
            value = {name: _without_private_formats(part) for name, part in value.items()}
        elif key in _LISTED and isinstance(value, list):
            value = [_without_private_formats(part) for part in value]
        elif key in _SINGLE:
            value = _without_private_formats(value)
        kept[key] = value
    return kept


def literal(text: str) -> str:
    """Text as it stands in Lark."""
    return json.dumps(text, ensure_ascii=False)


def marker(tokenizer: Tokenizer, text: str) -> str:
    """The element of a rule that matches `text`: by its id where it is a special token."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if len(token_ids) == 1 and tokenizer.is_special(token_ids[0]):
        return f"<[{token_ids[0]}]>"
    return literal(text)


def after(mark: str, grammar: str) -> str:
    """Free text up to the first `mark` (an element as `marker` writes it), the mark, and behind it,
    with or without white space, what `grammar` describes."""
    grammars = grammars_in(grammar)
    name = f"answer{len(grammars)}"  # nested ones have fewer
    free = f"free[suffix={mark}]: TEXT" if mark.startswith('"') else f"free: TEXT {mark}"
    lark = f"start: free SPACE @{name}\n{free}\nTEXT: {TEXT}\nSPACE: /[ \\n\\r\\t]{{0,8}}/\n"
    grammars[0]["name"] = name
    return json.dumps({"grammars": [{"lark_grammar": lark}, *grammars]})


def grammars_in(grammar: str) -> list[dict[str, Any]]:
    """A grammar as its JSON lists it: the answer's first."""
    if grammar.lstrip().startswith("{"):
        grammars: list[dict[str, Any]] = json.loads(grammar)["grammars"]
        return grammars
    return [{"lark_grammar": grammar}]


def _refusal(param: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid '{param}': {reason}.", param=param, code="invalid_value")
