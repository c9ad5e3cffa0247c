"""How /v1/messages words its answer: one message object, or the events of Anthropic's stream."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from server.error_forms import anthropics_body
from server.errors import ErrorReply
from server.generation import Delta, Generation
from server.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin, Usage
from server.protocol.answers import skip_block, skip_trace
from server.service import Service
from server.sse import named_event
from server.translation import in_the_clients_words
from skipllm_core.types import LayerNeurons

# Anthropic's service signs what its models think, to know it again. Nothing is signed here, and
# whatever comes back is taken.
SIGNATURE = "unsigned"

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesForm:
    """`names`: what the client calls the chat's fields."""

    def __init__(
        self,
        service: Service,
        generation: Generation,
        names: Mapping[str, str],
        request_id: str,
    ) -> None:
        self._generation = generation
        self._names = names
        self._request_id = request_id
        self._blocks = Blocks()
        self._skipped_layers: list[tuple[int, ...]] = []
        self._skipped_neurons: list[LayerNeurons] = []
        self._ending: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._head: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": service.model_name,
        }

    def whole(self, answers: Sequence[Delta]) -> dict[str, Any]:
        (delta,) = answers
        for _ in self._of_delta(delta):
            pass
        for _ in self._blocks.finish():
            pass
        message = {**self._head, "content": self._blocks.content, **self._ending}
        return message | self._usage_and_trace()

    def opening(self) -> Iterator[bytes]:
        usage = replace(self._generation.usage, num_generated_tokens=0, num_reasoning_tokens=0)
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None}
        message["usage"] = usage_block(usage)
        yield named_event("message_start", {"type": "message_start", "message": message})
        yield named_event("ping", {"type": "ping"})

    def events(self, delta: Delta) -> Iterator[bytes]:
        for event in self._of_delta(delta):
            yield named_event(event["type"], event)

    def closing(self) -> Iterator[bytes]:
        for event in self._blocks.finish():
            yield named_event(event["type"], event)
        end = {"type": "message_delta", "delta": self._ending} | self._usage_and_trace()
        yield named_event("message_delta", end)
        yield named_event("message_stop", {"type": "message_stop"})

    def failure(self, reply: ErrorReply) -> bytes:
        reply = in_the_clients_words(reply, self._names)
        return named_event("error", anthropics_body(reply, self._request_id))

    def _of_delta(self, delta: Delta) -> Iterator[dict[str, Any]]:
        self._skipped_layers += delta.skipped_layers
        self._skipped_neurons += delta.skipped_neurons
        if delta.finish_reason is not None:
            reason = _STOP_REASONS.get(delta.finish_reason)
            if isinstance(delta.stopped_by, str) and reason == "end_turn":
                reason = "stop_sequence"
                self._ending["stop_sequence"] = delta.stopped_by
            self._ending["stop_reason"] = reason
        return self._blocks.add(delta.parts)

    def _usage_and_trace(self) -> dict[str, Any]:
        trace = skip_trace(self._skipped_layers, self._skipped_neurons)
        return {"usage": usage_block(self._generation.usage), **trace}


def usage_block(usage: Usage) -> dict[str, Any]:
    """Cached tokens are not among Anthropic's `input_tokens`."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_generated_tokens,
        "output_tokens_details": {"thinking_tokens": usage.num_reasoning_tokens},
        "skip": skip_block(usage.skip),
    }


class Blocks:
    """The content blocks of one answer. `content` are those that are complete."""

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._texts: list[str] = []  # of the open block

    def add(self, parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
        for part in parts:
            match part:
                case Content(text):
                    if not self._is_open("text"):
                        yield from self._begin({"type": "text", "text": ""})
                    yield from self._continue("text_delta", "text", text)
                case Reasoning(text):
                    if not self._is_open("thinking"):
                        yield from self._begin(
                            {"type": "thinking", "thinking": "", "signature": ""}
                        )
                    yield from self._continue("thinking_delta", "thinking", text)
                case ToolCallBegin(_, call_id, name):
                    use = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                    yield from self._begin(use)
                case ToolCallArguments(_, text):
                    yield from self._continue("input_json_delta", "partial_json", text)

    def finish(self) -> Iterator[dict[str, Any]]:
        """Closes the last block. An answer of nothing at all is a block of no text: clients look
        for one."""
        if not self.content and self._open is None:
            yield from self._begin({"type": "text", "text": ""})
        yield from self._close()

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._open = block
        yield self._event("start", content_block=block)

    def _continue(self, kind: str, key: str, text: str) -> Iterator[dict[str, Any]]:
        self._texts.append(text)
        if text:
            yield self._event("delta", delta={"type": kind, key: text})

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        block, text = self._open, "".join(self._texts)
        match block["type"]:
            case "text":
                block = {**block, "text": text}
            case "thinking":
                signature = {"type": "signature_delta", "signature": SIGNATURE}
                yield self._event("delta", delta=signature)
                block = {**block, "thinking": text, "signature": SIGNATURE}
            case "tool_use":
                block = {**block, "input": _as_input(text)}
        yield self._event("stop")
        self.content.append(block)
        self._open = None
        self._texts = []

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": f"content_block_{kind}", "index": len(self.content), **more}


def _as_input(arguments: str) -> object:
    """The arguments as the object that they have to be here, in the model's own text. One that
    was cut off at max_tokens is none."""
    try:
        is_object = isinstance(orjson.loads(arguments), dict)
    except orjson.JSONDecodeError:
        is_object = False
    return orjson.Fragment(arguments) if is_object else {}
