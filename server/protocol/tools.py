"""Function tools as OpenAI's chat API writes them: what is offered, chosen, called and answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from server.protocol.wire import Wire, wrong
from skipllm_core.errors import InvalidRequestError

MAX_TOOLS = 128  # OpenAI's own bound
MAX_TOOL_CALLS = 128  # of one message
MAX_SCHEMA_BYTES = 256 * 1024  # of all tools together
MAX_SCHEMA_DEPTH = 64
NAME_PATTERN = r"^[a-zA-Z0-9_-]+$"

FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=NAME_PATTERN)]


def _parameters(value: Any) -> Any:
    """A JSON Schema of an object, of which only what all have in common is checked here."""
    if not isinstance(value, dict):
        return value
    if value.get("type", "object") != "object":
        raise wrong("function_parameters", "", value["type"])
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            child
            for found in level
            for child in (found.values() if isinstance(found, dict) else found)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise wrong("nested_too_deeply", "", None, max_depth=MAX_SCHEMA_DEPTH)


class Function(Wire):
    name: FunctionName
    """The function's name: letters, digits, _ and -, at most 64."""
    description: str | None = None
    """What the function does, for the model to choose by."""
    parameters: Annotated[
        dict[str, Any] | None, BeforeValidator(_parameters, dict[str, Any] | None)
    ] = None
    """A JSON Schema of the arguments, of the type `object`."""
    strict: bool | None = None
    """Whether every call of it keeps to the schema, whatever `tool_choice` is."""


class Tool(Wire):
    type: Literal["function"]
    """What kind of tool it is; this server has functions only."""
    function: Function
    """The function."""

    @property
    def name(self) -> str:
        return self.function.name

    @property
    def schema_(self) -> dict[str, Any]:
        return self.function.parameters or {"type": "object", "properties": {}}

    def for_template(self) -> dict[str, Any]:
        """In the order that models have been trained on."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        return {"type": "function", "function": {**function, "parameters": self.schema_}}


def _bounded(tools: list[Tool]) -> list[Tool]:
    num_bytes = sum(len(json.dumps(tool.for_template())) for tool in tools)
    if num_bytes > MAX_SCHEMA_BYTES:
        raise wrong("too_many_bytes", "", None, max_bytes=MAX_SCHEMA_BYTES)
    return tools


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), AfterValidator(_bounded)]


class CalledFunction(Wire):
    name: str
    """The function that was called."""
    arguments: str
    """Its arguments, as JSON text."""


class MessageToolCall(Wire):
    id: str
    """The call's id, which its result refers to."""
    type: Literal["function"] = "function"
    """What kind of tool was called."""
    function: CalledFunction
    """The call itself."""


class NamedFunction(Wire):
    name: str
    """A function of `tools`."""


class NamedTool(Wire):
    type: Literal["function"]
    """What kind of tool it is."""
    function: NamedFunction
    """Which one."""


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    """Whether one of them has to be called."""
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]
    """The tools of the request that may be called."""


class ChosenTool(Wire):
    """`tool_choice` as an object: the function to call, or those that may be called."""

    type: Literal["function", "allowed_tools"]
    """Which of the two it is."""
    function: NamedFunction | None = None
    """The function that has to be called."""
    allowed_tools: AllowedTools | None = None
    """The tools that may be called."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    mode: Literal["none", "auto", "required", "named"]
    names: tuple[str, ...] | None = None  # of the tools that may be called; None: all


def _tool_choice(value: Any) -> Any:
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    if isinstance(value, str):
        expected = "'none', 'auto' and 'required'"
        raise wrong("literal_error", "", value, expected=expected)
    try:
        choice = ChosenTool.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
        raise wrong(first["type"], path, first.get("input"), **first.get("ctx", {})) from None
    if choice.type == "function":
        if choice.function is None:
            raise wrong("missing", ".function", None)
        return ToolChoice("named", (choice.function.name,))
    allowed = choice.allowed_tools
    if allowed is None:
        raise wrong("missing", ".allowed_tools", None)
    return ToolChoice(allowed.mode, tuple(tool.function.name for tool in allowed.tools))


ToolChoiceField = Annotated[
    ToolChoice,
    BeforeValidator(_tool_choice, Literal["none", "auto", "required"] | ChosenTool),
]


def check_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> None:
    """Raises InvalidRequestError for a choice that the tools do not have."""
    if choice is None or (not tools and choice in (ToolChoice("none"), ToolChoice("auto"))):
        return
    if not tools:
        message = "'tool_choice' is only allowed when 'tools' are specified."
        raise _invalid_choice(f"Invalid value for 'tool_choice': {message}")
    known = {tool.name for tool in tools}
    for name in choice.names or ():
        if name not in known:
            raise _invalid_choice(f"Tool choice '{name[:64]}' not found in 'tools' parameter.")


def _invalid_choice(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="tool_choice", code="invalid_value")
