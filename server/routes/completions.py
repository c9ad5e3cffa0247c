"""POST /v1/completions"""

from __future__ import annotations

import asyncio
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
from server.parts import Content
from server.protocol.answers import completion_logprobs, stop_reason, usage_block
from server.protocol.completions import CompletionRequest, Prompt
from server.protocol.sampling import truncated
from server.protocol.schemas import Completion, CompletionChunk
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
from skipllm_core.detokenizer import whole_text
from skipllm_core.errors import ContextLengthError

router = StrictRouter()


@router.post("/v1/completions", **answers(Completion, stream=CompletionChunk))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continues one or more prompts, in one or, with `stream`, as it is generated."""
    service: Service = request.app.state.service
    refuse_early(service, body)
    constraint = constraint_of(body)
    try:
        prompts = await unless_disconnected(
            request.receive, asyncio.gather(*(_encode(service, body, p) for p in body.prompts))
        )
        generation = submit(service, request, body, prompts, constraint=constraint)
    except ContextLengthError as error:
        raise HTTPError(400, str(error), param="prompt", code=error.code) from None
    form = CompletionForm(service, body, prompts, generation)
    return await answer(request, generation, form, stream=bool(body.stream))


async def _encode(service: Service, body: CompletionRequest, prompt: Prompt) -> list[int]:
    if isinstance(prompt, list):
        return truncated(body, prompt)
    add_special_tokens = body.add_special_tokens is not False
    encode = functools.partial(
        service.tokenizer.encode, prompt, add_special_tokens=add_special_tokens
    )
    return await encode_prompt(service, body, len(prompt), encode)


class CompletionForm:
    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        prompts: Sequence[list[int]],
        generation: Generation,
    ) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._prompts = prompts
        self._generation = generation
        self._head: dict[str, Any] = {
            "id": f"cmpl-{body.request_id or uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
            "service_tier": None,
        }
        self._stream = ChunkStream(self._head, generation, body.stream_options)
        self._begun: set[int] = set()  # choices that have had a chunk

    def opening(self) -> Iterator[bytes]:
        if self._body.echo:
            for index in range(len(self._prompts) * (self._body.n or 1)):
                echoed = Delta(index, (Content(self._echoed(index)),))
                yield self._stream.chunk(self._chunk_choice(echoed), is_opening=True)

    def events(self, delta: Delta) -> Iterator[bytes]:
        more: dict[str, Any] = {}
        if delta.skipped_layers:
            more["skip"] = {"skipped_layers": delta.skipped_layers}
        yield self._stream.chunk(self._chunk_choice(delta), **more)

    def closing(self) -> Iterator[bytes]:
        return self._stream.closing()

    def failure(self, reply: ErrorReply) -> bytes:
        return failure(reply)

    def whole(self, answers: Sequence[Delta]) -> dict[str, Any]:
        choices = []
        for delta in answers:
            choice = {
                **self._choice(delta),
                "prompt_token_ids": None,
                "prompt_logprobs": None,
            }
            if self._body.echo:
                choice["text"] = self._echoed(delta.index) + choice["text"]
            if delta.skipped_layers:
                choice["skip"] = {"skipped_layers": delta.skipped_layers}
            if self._body.return_token_ids:
                choice["prompt_token_ids"] = self._prompt_ids(delta.index)
            choices.append(choice)
        return {
            **self._head,
            "choices": choices,
            "usage": usage_block(self._generation.usage),
            "kv_transfer_params": None,
        }

    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        choice = self._choice(delta)
        if self._body.return_token_ids and delta.index not in self._begun:
            choice["prompt_token_ids"] = self._prompt_ids(delta.index)
        self._begun.add(delta.index)
        return choice

    def _choice(self, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": stop_reason(delta.stopped_by, self._body.stop_token_ids or ()),
            "token_ids": None,
        }
        if self._body.logprobs is not None:
            choice["logprobs"] = completion_logprobs(
                self._tokenizer, delta.logprobs, delta.text_offsets
            )
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _prompt_ids(self, index: int) -> list[int]:
        return self._prompts[index // (self._body.n or 1)]

    def _echoed(self, index: int) -> str:
        """The prompt's text as it was given or, for ids and what is left of a text, as it reads."""
        prompt = self._body.prompts[index // (self._body.n or 1)]
        if isinstance(prompt, str) and self._body.truncate_prompt_tokens is None:
            return prompt
        return whole_text(self._tokenizer, self._prompt_ids(index))
