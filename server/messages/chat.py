"""A Messages request as a chat, and what is refused because a chat has nothing of the kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from server.protocol.chat import ChatRequest
from server.protocol.messages import (
    CountTokensRequest,
    JSONFormat,
    Message,
    MessagesRequest,
    TextBlock,
    Thinking,
    ToolResult,
    ToolUse,
)
from server.protocol.validation import unsupported
from server.translation import (
    EXTENSIONS,
    ChatMessages,
    in_the_clients_names,
    passed_on,
)

_MOVED = {
    "functions": "tools",
    "max_completion_tokens": "max_tokens",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}
# Known to Anthropic's API, and nothing that a chat could do.
_REFUSED = ("container", "context_management", "inference_geo", "mcp_servers")
# Known, and without an effect on the answer.
_IGNORED = (
    "cache_control", "diagnostics", "metadata", "service_tier", "speed", "user_profile_id",
    "workspace_id",
)  # fmt: skip


def to_chat(body: CountTokensRequest) -> tuple[ChatRequest, Mapping[str, str]]:
    """The chat that answers `body`, and what the client calls its fields. Raises
    InvalidRequestError."""
    messages = ChatMessages("messages")
    if body.system is not None:
        messages.say("system", body.system, "system")
    for index, message in enumerate(body.messages):
        _add(messages, message, f"messages[{index}]")
    form = "output_config.format" if body.output_format is None else "output_format"
    names = {
        **messages.names,
        "max_completion_tokens": "max_tokens",
        "reasoning_effort": "output_config.effort",
        "response_format": form,
        "response_format.json_schema": form,
        "stop": "stop_sequences",
        "tool_choice.function": "tool_choice",
    }
    for index in range(len(body.tools or ())):
        tool = f"tools[{index}]"
        names |= {f"{tool}.function": tool}
        names |= {f"{tool}.function.parameters": f"{tool}.input_schema"}
    fields = {**_passed_on(body), "messages": messages.wire, **_parameters(body)}
    if _is_begun(body.messages[-1]):
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    with in_the_clients_names(names):
        return ChatRequest.model_validate(fields), names


def _passed_on(body: CountTokensRequest) -> dict[str, object]:
    fields = passed_on(body.model_extra, _MOVED, EXTENSIONS - {"stop"})
    if _only_forgets_thinking(fields.get("context_management")):
        del fields["context_management"]
    for name in _REFUSED:
        if fields.pop(name, None):
            raise unsupported(name)
    for name in _IGNORED:
        fields.pop(name, None)
    return fields


def _parameters(body: CountTokensRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": body.model}
    choice, form = body.tool_choice, _form(body)
    if body.tools is not None:
        fields["tools"] = [tool.for_chat() for tool in body.tools]
    if choice is not None:
        fields["tool_choice"] = choice.for_chat()
        fields["parallel_tool_calls"] = False if choice.disable_parallel_tool_use else None
    if form is not None:
        schema = {"name": "output", "schema": form.schema_, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    fields["reasoning_effort"] = _effort(body)
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_completion_tokens": body.max_tokens,
            "skip": body.skip,
            "stop": body.stop_sequences,
            "stream": body.stream,
            "temperature": body.temperature,
            "top_k": body.top_k,
            "top_p": body.top_p,
        }
    return {name: value for name, value in fields.items() if value is not None}


def _form(body: CountTokensRequest) -> JSONFormat | None:
    if body.output_format is not None:
        return body.output_format
    return None if body.output_config is None else body.output_config.format


def _effort(body: CountTokensRequest) -> str | None:
    """Who does not ask for thinking gets none, as far as the model can do without."""
    if body.thinking is None or body.thinking.type == "disabled":
        return "none"
    effort = None if body.output_config is None else body.output_config.effort
    return "xhigh" if effort == "max" else effort


def _add(messages: ChatMessages, message: Message, path: str) -> None:
    """A turn; text of one role on end is one turn, and a tool's result one of its own."""
    for index, block in enumerate(message.content):
        place = f"{path}.content[{index}]"
        match block:
            case TextBlock():
                messages.say(message.role, [block.text], path, joins=True)
            case ToolUse():
                arguments = json.dumps(block.input, ensure_ascii=False)
                messages.call(block.id, block.name, arguments, place)
            case ToolResult():
                error = ["Error:"] if block.is_error else []
                messages.result(block.tool_use_id, error + (block.content or []), place)
            case Thinking():
                messages.reason(block.thinking)


def _only_forgets_thinking(management: object) -> bool:
    """Which earlier thinking a model is shown is for its chat template to say, so that a wish to
    clear it, which coding agents send with every request, asks for nothing."""
    edits = management.get("edits") if isinstance(management, dict) else None
    return isinstance(edits, list) and all(
        isinstance(edit, dict) and str(edit.get("type")).startswith("clear_thinking_")
        for edit in edits
    )


def _is_begun(last: Message) -> bool:
    """Whether the answer's beginning is given, to be continued."""
    texts = [block.text for block in last.content if isinstance(block, TextBlock)]
    return last.role == "assistant" and len(texts) == len(last.content) and any(texts)
