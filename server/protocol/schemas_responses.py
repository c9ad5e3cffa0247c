"""What /v1/responses answers, for /openapi.json; see schemas.py."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import RootModel

from server.protocol.schemas import ContentLogprob, Described, ErrorObject, SkipTrace, SkipUsage

Status = Literal["in_progress", "completed", "incomplete"]
Tier = Literal["default"]


class OutputText(Described):
    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]]
    logprobs: list[ContentLogprob]


class ReasoningText(Described):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(Described):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(Described):
    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[dict[str, Any]]
    """Always empty: the reasoning is told as it is."""
    content: list[ReasoningText]


class OutputCall(Described):
    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str
    """What the call's output refers to."""
    name: str
    arguments: str
    """JSON text, as the model wrote it."""


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(Described):
    cached_tokens: int
    """Input tokens whose K/V an earlier request had computed."""
    cache_write_tokens: int


class OutputTokensDetails(Described):
    reasoning_tokens: int


class ResponseUsage(Described):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    skip: SkipUsage


class IncompleteDetails(Described):
    reason: Literal["max_output_tokens"]


class ResponseError(Described):
    code: Literal["server_error"]
    message: str


class ResponseObject(Described):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    skip: SkipTrace | None = None
    """With skip.trace."""
    store: bool
    """Whether it is kept, once it is complete."""
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Tier
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class _Event(Described):
    sequence_number: int
    """Counts the events of the stream, from 0."""


class LifecycleEvent(_Event):
    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class ItemEvent(_Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class PartEvent(_Event):
    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText


class TextDeltaEvent(_Event):
    type: Literal["response.output_text.delta", "response.reasoning_text.delta"]
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ContentLogprob] | None = None


class TextDoneEvent(_Event):
    type: Literal["response.output_text.done", "response.reasoning_text.done"]
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ContentLogprob] | None = None


class ArgumentsDeltaEvent(_Event):
    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: int
    delta: str


class ArgumentsDoneEvent(_Event):
    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: int
    name: str
    arguments: str


class ErrorEvent(_Event):
    type: Literal["error"]
    code: str | None
    message: str
    param: str | None
    error: ErrorObject
    """The same, as OpenAI's client looks for it."""


class ResponseEvent(
    RootModel[
        LifecycleEvent
        | ItemEvent
        | PartEvent
        | TextDeltaEvent
        | TextDoneEvent
        | ArgumentsDeltaEvent
        | ArgumentsDoneEvent
        | ErrorEvent
    ]
):
    """One of the stream's events; `event:` says its type, too."""


class InputTokens(Described):
    object: Literal["response.input_tokens"]
    input_tokens: int


class InputItems(Described):
    object: Literal["list"]
    data: list[dict[str, Any]]
    """Items as they were given, each with an id."""
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(Described):
    id: str
    object: Literal["response"]
    deleted: Literal[True]
