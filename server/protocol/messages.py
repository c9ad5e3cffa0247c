"""The bodies of POST /v1/messages and /v1/messages/count_tokens: Anthropic's forms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from server.protocol.base import SkipWish, StopStrings, Wire, wrong
from server.protocol.chat import MAX_MESSAGES
from server.protocol.nested import check_num_parts, kind_of, nested, texts_of, tools_of

_TEXT = {"text": "text"}


class TextBlock(Wire):
    type: Literal["text"]
    """Text; this model reads nothing else."""
    text: str
    """The text."""


class ToolUse(Wire):
    type: Literal["tool_use"]
    """A call that the model made."""
    id: str
    """The call's id, which its result refers to."""
    name: str
    """The tool that was called."""
    input: dict[str, Any]
    """Its arguments."""


def _texts(value: Any) -> list[str]:
    return texts_of(value, "", _TEXT)


Texts = Annotated[list[str], BeforeValidator(_texts, str | list[TextBlock])]


class ToolResult(Wire):
    type: Literal["tool_result"]
    """What a call returned."""
    tool_use_id: str
    """The call's id."""
    content: Texts | None = None
    """Text, or blocks of text."""
    is_error: bool | None = None
    """Whether the call failed; the model is told so before the text."""


class Thinking(Wire):
    type: Literal["thinking"]
    """What the model thought."""
    thinking: str
    """Its text, for templates that show it."""
    signature: str | None = None
    """Accepted: whatever comes back is taken."""


class RedactedThinking(Wire):
    type: Literal["redacted_thinking"]
    """Reasoning that is not shown."""
    data: str
    """Accepted: the model is not shown it."""


Block = TextBlock | ToolUse | ToolResult | Thinking | RedactedThinking

_BLOCKS: dict[str, dict[str, type[Block]]] = {
    "system": {"text": TextBlock},
    "user": {"text": TextBlock, "tool_result": ToolResult},
    "assistant": {
        "text": TextBlock,
        "tool_use": ToolUse,
        "thinking": Thinking,
        "redacted_thinking": RedactedThinking,
    },
}


def _blocks(value: Any) -> Any:
    return [TextBlock(type="text", text=value)] if isinstance(value, str) else value


class _Message(Wire):
    role: Literal["user", "assistant", "system"]
    content: Any


class Message(Wire):
    role: Literal["user", "assistant", "system"]
    """Who speaks."""
    content: Annotated[list[Block], BeforeValidator(_blocks, str | list[Block])]
    """Text, or blocks."""


def _messages(value: Any) -> Any:
    """Every message with its content as blocks."""
    if not isinstance(value, list):
        return value
    check_num_parts(value, MAX_MESSAGES)
    return [_message(message, f"[{index}]") for index, message in enumerate(value)]


def _message(value: object, path: str) -> Message:
    given = nested(_Message, value, path)
    if isinstance(given.content, str):
        return Message(role=given.role, content=_blocks(given.content))
    if not isinstance(given.content, list):
        raise wrong("string_type", f"{path}.content", given.content)
    models = _BLOCKS[given.role]
    blocks = []
    for index, block in enumerate(given.content):
        place = f"{path}.content[{index}]"
        blocks.append(nested(models[kind_of(block, place, tuple(models))], block, place))
    return Message(role=given.role, content=blocks)


class Tool(Wire):
    type: Literal["custom"] | None = None
    """The client's own; it need not say so."""
    name: str
    """The tool's name."""
    description: str | None = None
    """What the tool does, for the model to choose by."""
    input_schema: dict[str, Any]
    """A JSON Schema of the arguments."""
    strict: bool | None = None
    """Whether every call of it keeps to the schema."""

    def for_chat(self) -> dict[str, Any]:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        given = {name: value for name, value in function.items() if value is not None}
        return {"type": "function", "function": given}


def _tools(value: Any) -> Any:
    return tools_of(value, Tool, "custom", default="custom")


class ToolChoice(Wire):
    type: Literal["auto", "any", "tool", "none"]
    """Whether the model may, must or must not call a tool, or has to call `name`."""
    name: str | None = None
    """The tool that has to be called."""
    disable_parallel_tool_use: bool | None = None
    """Whether an answer may have one call at most."""

    @model_validator(mode="after")
    def _names_its_tool(self) -> ToolChoice:
        if self.type == "tool" and self.name is None:
            raise wrong("missing", ".name", None)
        return self

    def for_chat(self) -> str | dict[str, Any]:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class ThinkingConfig(Wire):
    type: Literal["enabled", "disabled", "adaptive"]
    """Whether to think, where the chat template has a choice."""
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    """Accepted: `max_tokens` is the bound."""
    display: Literal["summarized", "omitted"] | None = None
    """Accepted: the reasoning is told as it is."""


class JSONFormat(Wire):
    type: Literal["json_schema"]
    """JSON under a schema."""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    """The schema."""


class OutputConfig(Wire):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """How much to think, where thinking is on."""
    format: JSONFormat | None = None
    """The form of the answer."""


class CountTokensRequest(Wire):
    """What of a request makes its prompt."""

    model: str | None = None
    """A name of the model; without one, the model that is served."""
    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MAX_MESSAGES), BeforeValidator(_messages)
    ]
    """The conversation. Text that the assistant says last is continued."""
    system: Texts | None = None
    """The system's message: text, or blocks of text."""
    tools: Annotated[list[Tool] | None, BeforeValidator(_tools)] = None
    """The tools that the model may call; those of the service are refused."""
    tool_choice: ToolChoice | None = None
    """Whether one is called."""
    thinking: ThinkingConfig | None = None
    """Whether to think; without it, not, where the chat template has a choice."""
    output_config: OutputConfig | None = None
    """The form of the answer, and how much to think."""
    output_format: JSONFormat | None = None
    """The form of the answer, as earlier clients say it."""


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    """Most tokens to generate; what the context has no room for is clipped."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events while it is generated."""
    stop_sequences: StopStrings | None = None
    """Up to 16 texts at which the answer ends; they are not part of it."""
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    """How far the choice of tokens is spread; 0 takes the likeliest."""
    top_p: float | None = None
    """Only the likeliest tokens whose probabilities add up to this are chosen from."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Only so many of the likeliest tokens are chosen from; 0: all."""
    skip: SkipWish | None = None
    """How this request skips FFN blocks; what is not said stays as the server has it."""
