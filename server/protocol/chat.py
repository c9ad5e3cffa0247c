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


class ChatMessage(Wire):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_join_parts, str | list[Any] | None)] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Any] | None = None

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
    thinking: bool | None = None

    @model_validator(mode="after")
    def _is_known(self) -> TemplateOptions:
        for key in self.model_extra or {}:
            raise wrong("unsupported", f".{key[:64]}", None)
        return self


class ChatRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @property
    def messages_for_template(self) -> list[Message]:
        return [message.for_template() for message in self.messages]
