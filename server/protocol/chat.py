"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from server.protocol.base import GenerationRequest, Wire, wrong
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
    tool_calls: list[Any] | None = None
    """Of role `assistant`: the calls that it made."""

    @model_validator(mode="after")
    def _is_something_we_can_render(self) -> ChatMessage:
        if self.tool_calls:
            raise wrong("unsupported", ".tool_calls", None)
        if self.content is None and self.role != "assistant":
            raise wrong("missing", ".content", None)
        return self

    def for_template(self) -> Message:
        fields = {"role": self.role, "content": self.content or ""}
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        return fields | {key: value for key, value in optional.items() if value is not None}


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

    @property
    def messages_for_template(self) -> list[Message]:
        return [message.for_template() for message in self.messages]
