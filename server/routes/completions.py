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
from server.protocol.answers import (
    completion_logprobs,
    echo_offsets,
    prompt_logprobs,
    skip_trace,
    stop_reason,
    token_label,
    token_text,
    usage_block,
)
from server.protocol.completions import CompletionRequest, Prompt
from server.protocol.sampling import num_prompt_logprobs, truncated
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
from skipllm_core.types import TokenLogprobs

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
        self._echoes = [self._echo(number) for number in range(len(prompts))] if body.echo else []
        self._is_scored = num_prompt_logprobs(body) is not None
        self._begun: set[int] = set()  # choices that have had a chunk

    def opening(self) -> Iterator[bytes]:
        if self._is_scored:
            return  # what is told of a prompt comes with the first text
        for number, echo in enumerate(self._echoes):
            for index in range(number * self._n, (number + 1) * self._n):
                echoed = Delta(index, (Content(echo),))
                yield self._stream.chunk(self._chunk_choice(echoed), is_opening=True)

    def events(self, delta: Delta) -> Iterator[bytes]:
        trace = skip_trace(delta.skipped_layers, delta.skipped_neurons)
        yield self._stream.chunk(self._chunk_choice(delta), **trace)

    def closing(self) -> Iterator[bytes]:
        return self._stream.closing()

    def failure(self, reply: ErrorReply) -> bytes:
        return failure(reply)

    def whole(self, answers: Sequence[Delta]) -> dict[str, Any]:
        choices = []
        for delta in answers:
            choice = {
                "prompt_token_ids": None,
                "prompt_logprobs": None,
                **self._choice(delta, has_prompt=True),
            }
            choice |= skip_trace(delta.skipped_layers, delta.skipped_neurons)
            if self._body.return_token_ids:
                choice["prompt_token_ids"] = self._prompts[delta.index // self._n]
            choices.append(choice)
        return {
            **self._head,
            "choices": choices,
            "usage": usage_block(self._generation.usage),
            "kv_transfer_params": None,
        }

    def _chunk_choice(self, delta: Delta) -> dict[str, Any]:
        is_first = delta.index not in self._begun
        self._begun.add(delta.index)
        choice = self._choice(delta, has_prompt=is_first and self._is_scored)
        if self._body.return_token_ids and is_first:
            choice["prompt_token_ids"] = self._prompts[delta.index // self._n]
        return choice

    def _choice(self, delta: Delta, *, has_prompt: bool = False) -> dict[str, Any]:
        """Of the delta, and of the prompt what is asked for."""
        body, number = self._body, delta.index // self._n
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": stop_reason(delta.stopped_by, self._body.stop_token_ids or ()),
            "token_ids": None,
        }
        if has_prompt and body.echo:
            choice["text"] = self._echoes[number] + delta.text
        if body.logprobs is not None:
            choice["logprobs"] = self._logprobs(delta, body.logprobs, has_prompt=has_prompt)
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        if has_prompt and body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer,
                self._prompts[number],
                delta.prompt_logprobs,
                body.prompt_logprobs,
            )
        return choice

    def _logprobs(self, delta: Delta, num_top: int, *, has_prompt: bool) -> dict[str, Any]:
        """Of the text's tokens. An echo is told with every token there is, the one included that
        ended the answer: who scores a prompt counts on one token behind it."""
        tokens: list[tuple[int, TokenLogprobs | None]] = list(delta.logprobs)
        offsets = list(delta.text_offsets[: len(tokens)])
        if self._body.echo:
            number = delta.index // self._n
            echo = self._echoes[number]
            tokens += delta.end_logprobs
            offsets = [len(echo) + offset for offset in delta.text_offsets]
            if has_prompt:
                ids = self._prompts[number]
                tokens = [*zip(ids, (None, *delta.prompt_logprobs), strict=True), *tokens]
                offsets = echo_offsets(self._tokenizer, ids, echo) + offsets
        name = token_label if self._body.return_tokens_as_token_ids else token_text
        return completion_logprobs(self._tokenizer, tokens, offsets, num_top, name)

    def _echo(self, number: int) -> str:
        """A prompt's text as it was given or, for ids and what is left of a text, as it reads."""
        prompt = self._body.prompts[number]
        if isinstance(prompt, str) and self._body.truncate_prompt_tokens is None:
            return prompt
        return whole_text(self._tokenizer, self._prompts[number])

    @property
    def _n(self) -> int:
        return self._body.n or 1
