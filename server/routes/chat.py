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
from server.protocol.answers import (
    chat_logprobs,
    prompt_logprobs,
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
from server.tools.grammars import constraint_of
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
    constraint = constraint_of(body)
    prompt_ids = await unless_disconnected(http.receive, encode_chat(service, body))
    return prompt_ids, submit(service, http, body, [prompt_ids], constraint=constraint)


async def encode_chat(service: Service, body: ChatRequest) -> list[int]:
    messages = body.messages_for_template
    options = body.chat_template_kwargs
    encode = functools.partial(
        service.tokenizer.encode_chat,
        messages,
        add_generation_prompt=body.add_generation_prompt is not False
        and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        options=options.model_dump(exclude_none=True) if options is not None else None,
    )
    num_chars = sum(len(message["content"]) for message in messages)
    return await encode_prompt(service, body, num_chars, encode)


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
                "message": {"role": "assistant", "content": delta.text, "refusal": None},
                "logprobs": None,
                "finish_reason": delta.finish_reason,
                "stop_reason": self._stop_reason(delta),
                "token_ids": None,
            }
            self._add_details(choice, delta)
            if delta.skipped_layers:
                choice["skip"] = {"skipped_layers": delta.skipped_layers}
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
        if delta.text:
            choice = self._choice(delta.index, {"content": delta.text})
        else:  # its last tokens, which have no text
            choice = self._choice(delta.index, {}, delta)
        self._add_details(choice, delta)
        more: dict[str, Any] = {}
        if delta.skipped_layers:
            more["skip"] = {"skipped_layers": delta.skipped_layers}
        if delta.index == 0 and not self._has_begun:
            self._has_begun = True
            if (found := self._prompt_logprobs(delta)) is not None:
                more["prompt_logprobs"] = found
        yield self._stream.chunk(choice, **more)
        if delta.text and delta.finish_reason is not None:
            yield self._stream.chunk(self._choice(delta.index, {}, delta))

    def closing(self) -> Iterator[bytes]:
        return self._stream.closing()

    def failure(self, reply: ErrorReply) -> bytes:
        return failure(reply)

    def _choice(
        self, index: int, delta: dict[str, Any], end: Delta | None = None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None if end is None else end.finish_reason,
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

    def _add_details(self, choice: dict[str, Any], delta: Delta) -> None:
        if self._body.logprobs:
            name = token_label if self._body.return_tokens_as_token_ids else token_text
            choice["logprobs"] = chat_logprobs(self._tokenizer, delta.logprobs, name)
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
