"""Pydantic's findings in OpenAI's words: the first fault, and at most a glimpse of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skipllm_core.errors import InvalidRequestError

MALFORMED_JSON = "We could not parse the JSON body of your request."

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a decimal",
    "string_type": "a string",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "schema_type": "a JSON Schema as an object",
    "input_type": "a string, or an array of items",
    "prompt_type": "a string, an array of strings, or arrays of token ids",
}
_GOT = {
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}
# pydantic's name of a bound: the sign that the message shows, and which side it is on
_BOUNDS = {
    "greater_than_equal": ("ge", ">=", "below", "min"),
    "greater_than": ("gt", ">", "below", "min"),
    "less_than_equal": ("le", "<=", "above", "max"),
    "less_than": ("lt", "<", "above", "max"),
}


def first_fault(errors: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    """The 400 for a body that failed; `errors` as `ValidationError.errors()` has them."""
    error = errors[0]
    context = error.get("ctx", {})
    kind = error["type"]
    param = path_of(error["loc"][1:]).removeprefix(".") + str(context.get("path", ""))
    got = context["got"] if "got" in context else error.get("input")
    if kind == "json_invalid" or (kind == "missing" and not param):
        return InvalidRequestError(MALFORMED_JSON)
    if _EXPECTED.get(kind) == "an integer" and isinstance(got, float) and abs(got) >= 2**63:
        return _beyond_64_bits(param, got)
    if kind in _EXPECTED:
        message = (
            f"Invalid type for '{param or 'body'}': expected {_EXPECTED[kind]}, "
            f"but got {_GOT.get(type(got), 'something else')} instead."
        )
        return _fault(param, message, "invalid_type")
    if kind in _BOUNDS:
        return _out_of_bounds(param, kind, context, got)
    if kind.endswith(("too_short", "too_long")):
        return _wrong_length(param, kind, context)
    return _other_fault(param, kind, context, got)


_MESSAGES = {
    "function_parameters": "Invalid schema for '{param}': schema must be a JSON Schema of "
    "'type: \"object\"', got {got}.",
    "nested_too_deeply": "Invalid '{param}': nested deeper than {max_depth} levels.",
    "string_pattern_mismatch": "Invalid '{param}': string does not match pattern. "
    "Expected a string that matches the pattern '{pattern}'.",
    "unsupported_value": "Invalid '{param}': {got} is not supported by this server. "
    "Supported values are: {expected}.",
    "too_many_bytes": "Invalid '{param}': larger than {max_bytes} bytes.",
}


def _told(kind: str, param: str, context: Mapping[str, Any], got: object) -> str:
    message = _MESSAGES.get(kind, "Invalid value for '{param}'.")
    return message.format_map({**context, "param": param, "got": _glimpse(got)})


def _other_fault(
    param: str, kind: str, context: Mapping[str, Any], got: object
) -> InvalidRequestError:
    match kind:
        case "missing":
            message = f"Missing required parameter: '{param}'."
            return _fault(param, message, "missing_required_parameter")
        case "extra_forbidden":
            return unknown(param)
        case "unsupported":
            return unsupported(param, context.get("successor"))
        case "unsupported_value":
            return _fault(param, _told(kind, param, context, got), kind)
        case "content_type":
            message = f"Invalid content type: {_glimpse(got)}. This model reads text only."
        case "token_id":
            message = f"Invalid key in '{param}': {_glimpse(got)}. Expected a token id."
        case "function_parameters":
            return _fault(param, _told(kind, param, context, got), "invalid_function_parameters")
        case "literal_error":
            expected = context["expected"]
            message = f"Invalid value: {_glimpse(got)}. Supported values are: {expected}."
        case _:
            message = _told(kind, param, context, got)
    return _fault(param, message, "invalid_value")


def unsupported(param: str, successor: str | None = None) -> InvalidRequestError:
    message = f"Unsupported parameter: '{param}' is not supported by this server."
    if successor is not None:
        message += f" Use '{successor}' instead."
    return InvalidRequestError(message, param=param, code="unsupported_parameter")


def unknown(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter"
    )


def _fault(param: str, message: str, code: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param or None, code=code)


def _out_of_bounds(
    param: str, kind: str, context: Mapping[str, Any], got: object
) -> InvalidRequestError:
    key, sign, side, end = _BOUNDS[kind]
    bound = context[key]
    number, bound = ("integer", bound) if isinstance(bound, int) else ("decimal", f"{bound:g}")
    message = (
        f"Invalid '{param}': {number} {side} {end}imum value. "
        f"Expected a value {sign} {bound}, but got {_glimpse(got)} instead."
    )
    return _fault(param, message, f"{number}_{side}_{end}_value")


def _beyond_64_bits(param: str, got: float) -> InvalidRequestError:
    """An integer that JSON may have and we may not: the parser made a decimal of it."""
    if got > 0:
        return _out_of_bounds(param, "less_than_equal", {"le": 2**63 - 1}, got)
    return _out_of_bounds(param, "greater_than_equal", {"ge": -(2**63)}, got)


def _wrong_length(param: str, kind: str, context: Mapping[str, Any]) -> InvalidRequestError:
    is_string = kind.startswith("string")
    thing, unit = ("string", "character") if is_string else ("array", "item")
    if kind.endswith("too_short"):
        message = f"Invalid '{param}': empty {thing}. Expected at least one {unit}."
        return _fault(param, message, f"empty_{thing}")
    message = (
        f"Invalid '{param}': {thing} too long. "
        f"Expected {thing} with maximum length {context['max_length']}."
    )
    return _fault(param, message, f"{thing}_above_max_length")


def path_of(loc: Sequence[str | int]) -> str:
    """`("messages", 0, "role")` as `.messages[0].role`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in loc)


def _glimpse(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 64 else text[:64] + "..."
