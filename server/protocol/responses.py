"""The body of POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from server.protocol.base import SkipWish
from server.protocol.items import InputItem, Item, ItemId, read_items
from server.protocol.nested import kind_of, nested, tools_of
from server.protocol.wire import Wire, wrong

Include = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


class FunctionTool(Wire):
    type: Literal["function"]
    """What kind of tool it is; this server has functions only."""
    name: str
    """The function's name."""
    description: str | None = None
    """What the function does, for the model to choose by."""
    parameters: dict[str, Any] | None = None
    """A JSON Schema of the arguments."""
    strict: bool | None = None
    """Whether every call of it keeps to the schema; not unless it is asked for."""

    def for_chat(self) -> dict[str, Any]:
        function = self.echo()
        function.pop("type")
        given = {name: value for name, value in function.items() if value is not None}
        return {"type": "function", "function": given}

    def echo(self) -> dict[str, Any]:
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": bool(self.strict),
        }


def _tools(value: Any) -> Any:
    return tools_of(value, FunctionTool, "function")


class FunctionChoice(Wire):
    type: Literal["function"]
    """One function."""
    name: str
    """Its name."""

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


def _choices(value: Any) -> Any:
    return tools_of(value, FunctionChoice, "function")


class AllowedTools(Wire):
    type: Literal["allowed_tools"]
    """Some of the tools."""
    mode: Literal["auto", "required"]
    """Whether one of them has to be called."""
    tools: Annotated[list[FunctionChoice], BeforeValidator(_choices)]
    """The functions that may be called."""

    def for_chat(self) -> dict[str, Any]:
        tools = [tool.for_chat() for tool in self.tools]
        return {"type": self.type, "allowed_tools": {"mode": self.mode, "tools": tools}}


ToolChoice = Literal["none", "auto", "required"] | FunctionChoice | AllowedTools


def _tool_choice(value: Any) -> Any:
    if value is None or value in ("none", "auto", "required"):
        return value
    if not isinstance(value, dict):
        raise wrong("literal_error", "", value, expected="'none', 'auto' or 'required'")
    kind = kind_of(value, "", ("function", "allowed_tools"))
    return nested(FunctionChoice if kind == "function" else AllowedTools, value, "")


class TextFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    """Any text, any JSON object, or JSON under a schema."""
    name: str | None = None
    """A name of the schema; it changes nothing."""
    description: str | None = None
    """What the schema is for; it changes nothing."""
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """The JSON schema itself."""
    strict: bool | None = None
    """Accepted: schemas are always kept to."""

    def for_chat(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        schema = self.echo()
        schema.pop("type")
        return {"type": self.type, "json_schema": schema}

    def echo(self) -> dict[str, Any]:
        fields = {"type", "name", "description", "schema_", "strict"}
        return self.model_dump(include=fields, exclude_none=True, by_alias=True)


class TextConfig(Wire):
    format: TextFormat | None = None
    """The form of the answer."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Medium alone: this server cannot say more or less."""


class Reasoning(Wire):
    effort: str | None = None
    """How much to think: `none` and `minimal` turn it off where the chat template can."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted: the reasoning is told as it is."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """The older name of `summary`."""


MAX_METADATA = 16


def _metadata(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_METADATA:
        raise wrong("too_long", "", value, max_length=MAX_METADATA)
    return value


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    BeforeValidator(_metadata),
]


class InputTokensRequest(Wire):
    """What of a request makes its prompt: the body of POST /v1/responses/input_tokens."""

    model: str | None = None
    """A name of the model; without one, the model that is served."""
    input: Annotated[list[Item], BeforeValidator(read_items, str | list[InputItem])]
    """Text, or the items of a conversation."""
    instructions: str | None = None
    """The system's message; it is not carried over to later responses."""
    previous_response_id: ItemId | None = None
    """A stored response whose conversation goes on."""
    tools: Annotated[list[FunctionTool] | None, BeforeValidator(_tools)] = None
    """The functions that the model may call; hosted tools are refused."""
    tool_choice: Annotated[ToolChoice | None, BeforeValidator(_tool_choice)] = None
    """Whether the model may, must or must not call a function, or which one it must."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls; it may by default."""
    text: TextConfig | None = None
    """The form of the answer."""
    reasoning: Reasoning | None = None
    """How much to think."""
    truncation: Literal["auto", "disabled"] | None = None
    """Disabled alone: what does not fit is refused."""


class ResponsesRequest(InputTokensRequest):
    stream: bool | None = None
    """Whether the answer comes as server-sent events while it is generated."""
    stream_options: dict[str, Any] | None = None
    """Accepted: there is no obfuscation to turn off."""
    store: bool | None = None
    """Whether the response is kept, to be continued or shown by its id; it is by default."""
    background: bool | None = None
    """False alone: there are no answers in the background."""
    include: Annotated[list[Include], Field(max_length=64)] | None = None
    """What to tell besides: of these, the log probabilities of the text."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate, reasoning included."""
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Accepted: it bounds calls of hosted tools, of which there are none."""
    # The chat has bounds for these two.
    temperature: float | None = None
    """How far the choice of tokens is spread; 0 takes the likeliest."""
    top_p: float | None = None
    """Only the likeliest tokens whose probabilities add up to this are chosen from."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """With the log probabilities included: how many of the likeliest tokens to tell."""
    metadata: Metadata | None = None
    """Up to 16 texts, told again in the response."""
    user: str | None = None
    """Told again in the response."""
    safety_identifier: str | None = None
    """Told again in the response."""
    prompt_cache_key: str | None = None
    """Told again in the response; what prompts share is found without it."""
    prompt_cache_retention: str | None = None
    """Accepted: what prompts share is kept as long as there is room."""
    service_tier: str | None = None
    """Accepted: there is one tier."""
    skip: SkipWish | None = None
    """How this request skips FFN blocks; what is not said stays as the server has it."""
