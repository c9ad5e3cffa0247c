"""A Responses request as a chat, and what is refused because a chat has nothing of the kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.protocol.chat import ChatRequest
from server.protocol.items import Item
from server.protocol.responses import InputTokensRequest, ResponsesRequest
from server.protocol.validation import unsupported
from server.translation import ChatMessages, in_the_clients_names, passed_on
from skipllm_core.errors import InvalidRequestError

LOGPROBS = "message.output_text.logprobs"

_MOVED = {
    "functions": "tools",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
# Known to OpenAI's API, and nothing that a chat could do: what each asks for is kept elsewhere, or
# done by a service that is not here.
_REFUSED = (
    "background_options", "context_management", "conversation", "image", "moderation", "prompt",
)  # fmt: skip
_IGNORED = ("access_programs", "prompt_cache_options")


def to_chat(
    body: InputTokensRequest, before: Sequence[Item], items: Sequence[Item]
) -> tuple[ChatRequest, Mapping[str, str]]:
    """The chat that answers `items`, the body's own, after those `before`; and what the client
    calls its fields. Raises InvalidRequestError."""
    messages = ChatMessages("input")
    if body.instructions is not None:
        messages.say("system", [body.instructions], "instructions")
    calls: set[str] = set()
    for item in before:
        _add(messages, item, "previous_response_id", calls)
    for index, item in enumerate(items):
        _add(messages, item, f"input[{index}]", calls)
    names = {
        **messages.names,
        "max_completion_tokens": "max_output_tokens",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
        "response_format.json_schema": "text.format",
        "tool_choice.function": "tool_choice",
        "tool_choice.allowed_tools": "tool_choice",
        "verbosity": "text.verbosity",
        **{f"tools[{i}].function": f"tools[{i}]" for i in range(len(body.tools or ()))},
    }
    fields = {**_passed_on(body), "messages": messages.wire, **_parameters(body)}
    with in_the_clients_names(names):
        return ChatRequest.model_validate(fields), names


def _passed_on(body: InputTokensRequest) -> dict[str, object]:
    fields = passed_on(body.model_extra, _MOVED)
    for name in _REFUSED:
        if fields.pop(name, None):
            raise unsupported(name)
    for name in _IGNORED:
        fields.pop(name, None)
    if body.truncation == "auto":
        raise unsupported("truncation")
    if isinstance(body, ResponsesRequest) and body.background:
        raise unsupported("background")
    return fields


def _parameters(body: InputTokensRequest) -> dict[str, Any]:
    choice, text, reasoning = body.tool_choice, body.text, body.reasoning
    fields: dict[str, Any] = {"model": body.model}
    if body.tools is not None:
        fields["tools"] = [tool.for_chat() for tool in body.tools]
    fields["tool_choice"] = choice if isinstance(choice, str | None) else choice.for_chat()
    fields["parallel_tool_calls"] = body.parallel_tool_calls
    if text is not None:
        fields["verbosity"] = text.verbosity
        fields["response_format"] = None if text.format is None else text.format.for_chat()
    if reasoning is not None:
        fields["reasoning_effort"] = reasoning.effort
    if isinstance(body, ResponsesRequest):
        fields |= {
            "max_completion_tokens": body.max_output_tokens,
            "skip": body.skip,
            "stream": body.stream,
            "temperature": body.temperature,
            "top_p": body.top_p,
        }
        if LOGPROBS in (body.include or ()):
            fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return {name: value for name, value in fields.items() if value is not None}


def _add(messages: ChatMessages, item: Item, path: str, calls: set[str]) -> None:
    match item["type"]:
        case "message":
            messages.say(item["role"], [part["text"] for part in item["content"]], path)
        case "function_call":
            calls.add(item["call_id"])
            messages.call(item["call_id"], item["name"], item["arguments"], path)
        case "function_call_output":
            if item["call_id"] not in calls:
                raise InvalidRequestError(
                    f"No tool call found for function call output with call_id {item['call_id']}.",
                    param=f"{path}.call_id",
                    code="invalid_value",
                )
            messages.result(item["call_id"], [item["output"]], path)
        case "reasoning":
            messages.reason("".join(part["text"] for part in item["content"]))
