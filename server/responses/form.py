"""How /v1/responses words its answer: one response object, or the events of OpenAI's stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from server.errors import ErrorReply
from server.generation import Delta, Generation
from server.parts import EndReason, Usage
from server.protocol.answers import chat_logprobs, skip_block, skip_trace
from server.protocol.items import new_id
from server.protocol.responses import ResponsesRequest
from server.responses.chat import LOGPROBS
from server.responses.output import Event, Logprobs, Output
from server.service import Service
from server.sse import named_event
from server.translation import in_the_clients_words
from skipllm_core.types import LayerNeurons


class ResponsesForm:
    """`names`: what the client calls the chat's fields. `keep` gets the response once it is
    complete, and tells whether it is stored; None: it is not to be."""

    def __init__(
        self,
        service: Service,
        body: ResponsesRequest,
        names: Mapping[str, str],
        generation: Generation,
        keep: Callable[[dict[str, Any]], bool] | None,
    ) -> None:
        self._tokenizer = service.tokenizer
        self._names = names
        self._generation = generation
        self._keep = keep
        self._wants_logprobs = LOGPROBS in (body.include or ())
        self._output = Output()
        self._finish_reason: EndReason | None = None
        self._skipped_layers: list[tuple[int, ...]] = []
        self._skipped_neurons: list[LayerNeurons] = []
        self._num_events = 0
        self._head = _head(service, body, is_kept=keep is not None)

    def whole(self, answers: Sequence[Delta]) -> dict[str, Any]:
        (delta,) = answers
        for _ in self._of_delta(delta):
            pass
        for _ in self._output.finish(self._status):
            pass
        return self._ended()

    def opening(self) -> Iterator[bytes]:
        response = self._response("in_progress")
        yield self._numbered({"type": "response.created", "response": response})
        yield self._numbered({"type": "response.in_progress", "response": response})

    def events(self, delta: Delta) -> Iterator[bytes]:
        return map(self._numbered, self._of_delta(delta))

    def closing(self) -> Iterator[bytes]:
        yield from map(self._numbered, self._output.finish(self._status))
        yield self._numbered({"type": f"response.{self._status}", "response": self._ended()})

    def failure(self, reply: ErrorReply) -> bytes:
        """The failed response, and the error, at which OpenAI's client raises."""
        reply = in_the_clients_words(reply, self._names)
        opening = b"" if self._num_events else b"".join(self.opening())
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": reply.message}
        failed = self._numbered({"type": "response.failed", "response": response})
        error = reply.body["error"]
        facts = {key: error[key] for key in ("code", "message", "param")}
        return opening + failed + self._numbered({"type": "error", **facts, "error": error})

    def _of_delta(self, delta: Delta) -> Iterator[Event]:
        self._finish_reason = delta.finish_reason
        self._skipped_layers += delta.skipped_layers
        self._skipped_neurons += delta.skipped_neurons
        logprobs: Logprobs = []
        if self._wants_logprobs:
            logprobs = chat_logprobs(self._tokenizer, delta.logprobs)["content"]
        return self._output.add(delta.parts, logprobs)

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _numbered(self, event: Event) -> bytes:
        event = {**event, "sequence_number": self._num_events}
        self._num_events += 1
        return named_event(event["type"], event)

    def _response(self, status: str) -> dict[str, Any]:
        return {**self._head, "status": status, "output": list(self._output.items)}

    def _ended(self) -> dict[str, Any]:
        response = self._response(self._status)
        if self._status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        response["usage"] = usage_block(self._generation.usage)
        response |= skip_trace(self._skipped_layers, self._skipped_neurons)
        if self._keep is not None:
            response["store"] = self._keep(response)
        return response


def usage_block(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_generated_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_tokens,
        "skip": skip_block(usage.skip),
    }


def _head(service: Service, body: ResponsesRequest, *, is_kept: bool) -> dict[str, Any]:
    """What a response says of its request, and what is not yet known."""
    defaults = service.sampling_defaults
    text, reasoning = body.text, body.reasoning
    text_format = None if text is None or text.format is None else text.format
    summary = None if reasoning is None else reasoning.summary or reasoning.generate_summary
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": service.model_name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": summary,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": is_kept,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "text": {
            "format": {"type": "text"} if text_format is None else text_format.echo(),
            "verbosity": "medium" if text is None else text.verbosity or "medium",
        },
        "tool_choice": _choice(body),
        "tools": [tool.echo() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _choice(body: ResponsesRequest) -> object:
    choice = body.tool_choice
    return choice or "auto" if isinstance(choice, str | None) else choice.model_dump()
