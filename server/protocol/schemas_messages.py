"""What /v1/messages answers, for /openapi.json; see schemas.py."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import RootModel

from server.protocol.schemas import Described, SkipTrace, SkipUsage


class MessagesErrorObject(Described):
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "overloaded_error",
        "timeout_error",
        "api_error",
    ]
    message: str


class MessagesError(Described):
    type: Literal["error"]
    error: MessagesErrorObject
    request_id: str


class TextOutput(Described):
    type: Literal["text"]
    text: str


class ThinkingOutput(Described):
    type: Literal["thinking"]
    thinking: str
    signature: str
    """Says nothing: whatever comes back is taken."""


class ToolUseOutput(Described):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Output = TextOutput | ThinkingOutput | ToolUseOutput


class ThinkingTokens(Described):
    thinking_tokens: int


class MessageUsage(Described):
    input_tokens: int
    """Without those that were cached."""
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    """Input tokens whose K/V an earlier request had computed."""
    output_tokens: int
    output_tokens_details: ThinkingTokens
    skip: SkipUsage


class MessageEnding(Described):
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None


class MessageObject(MessageEnding):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Output]
    usage: MessageUsage
    skip: SkipTrace | None = None
    """With skip.trace."""


class MessageStartEvent(Described):
    type: Literal["message_start"]
    message: MessageObject


class BlockStartEvent(Described):
    type: Literal["content_block_start"]
    index: int
    content_block: Output


class TextDelta(Described):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(Described):
    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(Described):
    type: Literal["signature_delta"]
    signature: str


class InputDelta(Described):
    type: Literal["input_json_delta"]
    partial_json: str


class BlockDeltaEvent(Described):
    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStopEvent(Described):
    type: Literal["content_block_stop"]
    index: int


class MessageDeltaEvent(Described):
    type: Literal["message_delta"]
    delta: MessageEnding
    usage: MessageUsage
    skip: SkipTrace | None = None


class BareEvent(Described):
    type: Literal["message_stop", "ping"]


class MessageEvent(
    RootModel[
        MessageStartEvent
        | BlockStartEvent
        | BlockDeltaEvent
        | BlockStopEvent
        | MessageDeltaEvent
        | BareEvent
        | MessagesError
    ]
):
    """One of the stream's events; `event:` says its type, too."""


class MessageTokens(Described):
    input_tokens: int
