"""Checks within a field whose validator decides by itself what its parts have to be: faults are
told at their place, as pydantic would tell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from server.protocol.tools import MAX_TOOLS
from server.protocol.validation import path_of
from server.protocol.wire import Wire, wrong

MAX_PARTS = 8192  # of all contents of a request: they are looked at on the event loop

W = TypeVar("W", bound=Wire)


def nested(model: type[W], value: object, path: str) -> W:
    """`value` as a `model`, where a validator of an outer field decides which model it is. Raises
    what pydantic would for the fault at `path`."""
    if not isinstance(value, dict):
        raise wrong("dict_type", path, value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        fault = error.errors()[0]
        context = fault.get("ctx", {})
        path += path_of(fault["loc"]) + str(context.get("path", ""))
        got = context["got"] if "got" in context else fault["input"]
        details = {key: value for key, value in context.items() if key not in ("path", "got")}
        raise wrong(fault["type"], path, got, **details) from None


def kind_of(value: object, path: str, supported: Sequence[str], default: str | None = None) -> str:
    """The `type` of a tagged object; one that is not among the supported is refused by name."""
    if not isinstance(value, dict):
        raise wrong("dict_type", path, value)
    kind = value.get("type") or default
    if kind is None:
        raise wrong("missing", f"{path}.type", None)
    if not isinstance(kind, str):
        raise wrong("string_type", f"{path}.type", kind)
    if kind not in supported:
        expected = ", ".join(map(repr, supported))
        raise wrong("unsupported_value", f"{path}.type", kind, expected=expected)
    return kind


def texts_of(value: object, path: str, keys: Mapping[str, str]) -> list[str]:
    """The texts of a content: a string, or parts. `keys` has the types that parts may be, and
    where each has its text."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong("string_type", path, value)
    if len(value) > MAX_PARTS:
        raise wrong("too_long", path, value, max_length=MAX_PARTS)
    texts = []
    for index, part in enumerate(value):
        key = keys[kind_of(part, f"{path}[{index}]", tuple(keys))]
        if key not in part:
            raise wrong("missing", f"{path}[{index}].{key}", None)
        if not isinstance(part[key], str):
            raise wrong("string_type", f"{path}[{index}].{key}", part[key])
        texts.append(part[key])
    return texts


def check_num_parts(value: list[Any], max_length: int) -> None:
    """Bounds the messages of a conversation, and their parts on all levels, before any is read."""
    if len(value) > max_length:
        raise wrong("too_long", "", value, max_length=max_length)
    num_parts = 0
    level: list[Any] = value
    for _ in range(2):  # blocks have contents, too
        level = [
            part
            for item in level
            if isinstance(item, dict)
            for content in (item.get("content"), item.get("output"))
            if isinstance(content, list)
            for part in content
        ]
        num_parts += len(level)
    if num_parts > MAX_PARTS:
        raise wrong("too_long", "", value, max_length=MAX_PARTS)


def tools_of(value: object, model: type[W], kind: str, *, default: str | None = None) -> object:
    """A list of tools of one kind; tools of other kinds are refused by name."""
    if not isinstance(value, list):
        return value
    if len(value) > MAX_TOOLS:
        raise wrong("too_long", "", value, max_length=MAX_TOOLS)
    tools = []
    for index, tool in enumerate(value):
        path = f"[{index}]"
        kind_of(tool, path, (kind,), default)
        tools.append(nested(model, tool, path))
    return tools
