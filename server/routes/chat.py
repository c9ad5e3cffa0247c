"""POST /v1/chat/completions"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response

from server.errors import ErrorReply, HTTPError
from server.generation import Delta, Generation
from server.openapi import answers
from server.parts import (
    Answer,
    Content,
    Part,
    Reasoning,
    ToolCallArguments,
    ToolCallBegin,
    joined,
    merged,
)
from server.protocol.answers import (
    chat_logprobs,
    prompt_logprobs,
    skip_trace,
    stop_reason,
    token_label,
    token_text,
    usage_block,
)
from server.protocol.chat import ChatRequest
from server.protocol.schemas import ChatCompletion, ChatCompletionChunk
from server.routes.answering import (
    answer,
    encode_prompt,
    refuse_early,
    submit,
    unless_disconnected,
)
from server.routes.chunks import ChunkStream, failure
from server.routes.strict import StrictRouter
from server.service import Service
from server.tools.prompting import prompt_of
from server.tools.reading import reading_of, tools_told
from skipllm_core.errors import ContextLengthError

router = StrictRouter()


@router.post("/v1/chat/completions", **answers(ChatCompletion, stream=ChatCompletionChunk))
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation, in one or, with `stream`, as it is generated."""
    service: Service = request.app.state.service
    try:
        prompt_ids, generation = await begin_chat(service, request, body)
    except ContextLengthError as error:
        message = error.message_for("messages")
        raise HTTPError(400, message, param="messages", code=error.code) from None
    form = ChatForm(service, body, prompt_ids, generation)
    return await answer(request, generation, form, stream=bool(body.stream))


async def begin_chat(
    service: Service, http: Request, body: ChatRequest
) -> tuple[list[int], Generation]:
    """A chat's prompt, and its generation under way. Every endpoint that chats begins here, and
    words a ContextLengthError itself."""
    refuse_early(service, body)
    prompt_ids = await unless_disconnected(http.receive, encode_chat(service, body))
    max_model_len = service.engine.info.max_model_len
    reading = reading_of(service.chat_style, service.tokenizer, body, prompt_ids, max_model_len)
    generation = submit(
        service,
        http,
        body,
        [prompt_ids],
        reading.new_parser,
        constraint=reading.constraint,
        shown_tokens=reading.shown_tokens,
    )
    return prompt_ids, generation


async def encode_chat(service: Service, body: ChatRequest) -> list[int]:
    prompt = prompt_of(
        service.chat_style,
        body.messages_for_template,
        [tool.for_template() for tool in tools_told(body)],
    )
    encode = functools.partial(
        service.tokenizer.encode_chat,
        prompt.messages,
        tools=prompt.tools,
        add_generation_prompt=body.add_generation_prompt is not False
        and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        options=body.template_options,
    )
    return await encode_prompt(service, body, prompt.num_chars, encode)


class ChatForm:
    def __init__(
        self, service: Service, body: ChatRequest, prompt_ids: list[int], generation: Generation
    ) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._prompt_ids = prompt_ids
        self._generation = generation
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{body.request_id or uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
            "service_tier": None,
        }
        self._stream = ChunkStream(self._head, generation, body.stream_options)
        self._has_begun = False  # the first choice, with which the prompt is told of

    def whole(self, answers: Sequence[Delta]) -> dict[str, Any]:
        choices = []
        for delta in answers:
            choice: dict[str, Any] = {
                "index": delta.index,
                "message": _message(joined(self._told(delta))),
                "logprobs": None,
                "finish_reason": self._finish_reason(delta),
                "stop_reason": self._stop_reason(delta),
                "token_ids": None,
            }
            self._add_details(choice, delta)
            choice |= skip_trace(delta.skipped_layers, delta.skipped_neurons)
            choices.append(choice)
        return {
            **self._head,
            "choices": choices,
            "usage": usage_block(self._generation.usage),
            "prompt_logprobs": self._prompt_logprobs(answers[0]),
            "prompt_token_ids": self._prompt_ids if self._body.return_token_ids else None,
            "kv_transfer_params": None,
        }

    def opening(self) -> Iterator[bytes]:
        for index in range(self._body.n or 1):
            more: dict[str, Any] = {}
            if self._body.return_token_ids and index == 0:
                more["prompt_token_ids"] = self._prompt_ids
            choice = self._choice(index, {"role": "assistant", "content": ""})
            yield self._stream.chunk(choice, is_opening=True, **more)

    def events(self, delta: Delta) -> Iterator[bytes]:
        """A chunk for each part; the tokens' details are in the first."""
        parts = self._told(delta)
        if not parts and delta.parts and delta.finish_reason is None:
            return
        first, *rest = [_delta(part) for part in merged(parts)] or [{}]
        # Its last tokens may have no text: then their chunk ends the choice.
        choice = self._choice(delta.index, first, None if first else delta)
        self._add_details(choice, delta)
        more: dict[str, Any] = {**skip_trace(delta.skipped_layers, delta.skipped_neurons)}
        if delta.index == 0 and not self._has_begun:
            self._has_begun = True
            if (found := self._prompt_logprobs(delta)) is not None:
                more["prompt_logprobs"] = found
        yield self._stream.chunk(choice, **more)
        for part in rest:
            yield self._stream.chunk(self._choice(delta.index, part))
        if first and delta.finish_reason is not None:
            yield self._stream.chunk(self._choice(delta.index, {}, delta))

    def closing(self) -> Iterator[bytes]:
        return self._stream.closing()

    def failure(self, reply: ErrorReply) -> bytes:
        return failure(reply)

    def _told(self, delta: Delta) -> tuple[Part, ...]:
        """The parts that the client wants to see."""
        if self._body.include_reasoning is not False:
            return delta.parts
        return tuple(part for part in delta.parts if not isinstance(part, Reasoning))

    def _choice(
        self, index: int, delta: dict[str, Any], end: Delta | None = None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None if end is None else self._finish_reason(end),
            "stop_reason": None if end is None else self._stop_reason(end),
        }

    def _stop_reason(self, delta: Delta) -> str | int | None:
        return stop_reason(delta.stopped_by, self._body.stop_token_ids or ())

    def _prompt_logprobs(self, delta: Delta) -> list[dict[str, Any] | None] | None:
        """From the first choice's first delta."""
        num_top, found = self._body.prompt_logprobs, delta.prompt_logprobs
        if num_top is None:
            return None
        return prompt_logprobs(self._tokenizer, self._prompt_ids, found, num_top)

    def _finish_reason(self, delta: Delta) -> str | None:
        """As OpenAI has it: a function that was named is called, and that is no reason to stop."""
        choice = self._body.tool_choice
        is_named = choice is not None and choice.mode == "named"
        return "stop" if is_named and delta.finish_reason == "tool_calls" else delta.finish_reason

    def _add_details(self, choice: dict[str, Any], delta: Delta) -> None:
        if self._body.logprobs:
            name = token_label if self._body.return_tokens_as_token_ids else token_text
            choice["logprobs"] = chat_logprobs(self._tokenizer, delta.logprobs, name)
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids


def _message(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning:
        message |= _reasoning(answer.reasoning)
    if answer.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in answer.tool_calls
        ]
    if not answer.content and (answer.reasoning or answer.tool_calls):
        message["content"] = None
    return message


def _reasoning(text: str) -> dict[str, Any]:
    """By DeepSeek's name, which most clients read, and by the one that vLLM's read now."""
    return {"reasoning_content": text, "reasoning": text}


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return _reasoning(text)
        case ToolCallBegin(index, call_id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
