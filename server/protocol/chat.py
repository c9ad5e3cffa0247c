"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from server.protocol.base import GenerationRequest, Wire, wrong
from server.protocol.tools import MAX_TOOL_CALLS, MessageToolCall, ToolChoiceField, Tools
from skipllm_core.chat_template import Message

MAX_MESSAGES = 2048  # OpenAI's own bound


def _join_parts(value: Any) -> Any:
    """A content's text parts, one per line; text is all that this model reads."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict):
            raise wrong("dict_type", f"[{index}]", part)
        for key in ("type", "text") if part.get("type") == "text" else ("type",):
            if key not in part:
                raise wrong("missing", f"[{index}].{key}", None)
            if not isinstance(part[key], str):
                raise wrong("string_type", f"[{index}].{key}", part[key])
        if part["type"] != "text":
            raise wrong("content_type", f"[{index}].type", part["type"])
        texts.append(part["text"])
    return "\n".join(texts)


class TextPart(Wire):
    type: Literal["text"]
    """The only type that this model reads."""
    text: str
    """What is said."""


class ChatMessage(Wire):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    """Who speaks."""
    content: Annotated[str | None, BeforeValidator(_join_parts, str | list[TextPart] | None)] = None
    """What is said: text, or an array of parts of the type `text`."""
    name: str | None = None
    """The speaker's name, for templates that show it."""
    tool_call_id: str | None = None
    """Of role `tool`: the call that is answered."""
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = None
    """Of role `assistant`: the calls that it made."""
    reasoning_content: str | None = None
    """Of role `assistant`: what it thought, for templates that show it."""
    reasoning: str | None = None
    """The same, as vLLM calls it."""

    @model_validator(mode="after")
    def _is_something_we_can_render(self) -> ChatMessage:
        if (self.model_extra or {}).get("function_call") is not None:
            raise wrong("unsupported", ".function_call", None, successor="tool_calls")
        if self.content is None and self.role != "assistant":
            raise wrong("missing", ".content", None)
        if self.role == "tool" and self.tool_call_id is None:
            raise wrong("missing", ".tool_call_id", None)
        return self

    def for_template(self) -> Message:
        """What is said and done; a call's arguments are their text."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.name is not None:
            message["name"] = self.name
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        if self.role == "assistant":
            if (thought := self.reasoning_content or self.reasoning) is not None:
                message["reasoning_content"] = thought
            if self.tool_calls:
                message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


class TemplateOptions(Wire):
    """The chat template's own switches that a request may set."""

    enable_thinking: bool | None = None
    """Whether the model thinks before it answers, as Qwen's templates call it."""
    thinking: bool | None = None
    """The same, as DeepSeek's templates call it."""

    @model_validator(mode="after")
    def _is_known(self) -> TemplateOptions:
        for key in self.model_extra or {}:
            raise wrong("unsupported", f".{key[:64]}", None)
        return self


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate, as OpenAI calls it now; wins over max_tokens."""
    logprobs: bool | None = None
    """Whether the answer tells the log probabilities of its tokens."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """With logprobs: how many of the likeliest tokens to tell at each place."""
    add_generation_prompt: bool | None = None
    """Whether the template opens the assistant's turn; it does by default."""
    continue_final_message: bool | None = None
    """Whether the last message is continued, instead of answered."""
    chat_template_kwargs: TemplateOptions | None = None
    """Switches of the model's chat template."""
    tools: Tools | None = None
    """The functions that the model may call."""
    tool_choice: ToolChoiceField | None = None
    """Whether it may, must or must not call one, or which one it must."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls; it may by default."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """How much to think: `none` and `minimal` turn it off where the chat template can."""
    include_reasoning: bool | None = None
    """Whether reasoning is told, apart from the content; it is by default."""

    @property
    def messages_for_template(self) -> list[Message]:
        return [message.for_template() for message in self.messages]

    @property
    def template_options(self) -> dict[str, object]:
        """What the template's own switches say, else what the effort means for them."""
        options: dict[str, object] = {}
        if self.reasoning_effort is not None:
            thinks = self.reasoning_effort not in ("none", "minimal")
            options = {"enable_thinking": thinks, "thinking": thinks}
            options["reasoning_effort"] = self.reasoning_effort
        if self.chat_template_kwargs is not None:
            options |= self.chat_template_kwargs.model_dump(exclude_none=True)
        return options
