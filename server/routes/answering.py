"""From a validated request to its answer, streaming and not: the same deltas, joined or one by one.

refuse -> encode -> submit -> first output of the engine -> 200 -> events, or one JSON object
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from server.errors import ClientDisconnectedError, json_response, log_failure, reply_to
from server.generation import Choice, Delta, Generation
from server.protocol.answers import usage
from server.protocol.base import StreamOptions
from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.sampling import check_combinations, to_sampling_params, to_skip_params
from server.service import Service
from server.sse import DONE, event, event_stream
from skipllm_core.detokenizer import Detokenizer

T = TypeVar("T")


class AnswerForm(Protocol):
    """How an endpoint words its answer. Implementations: chat, completions."""

    def opening(self) -> Iterator[dict[str, Any]]:
        """The chunks before the first text."""
        ...

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The chunks of a delta that has text or ends a choice."""
        ...

    def usage_chunk(self) -> dict[str, Any]:
        """A chunk without choices, to which the usage is added."""
        ...

    def whole(self, answers: Sequence[Delta]) -> dict[str, Any]:
        """The answer in one, without usage; one joined delta for each choice."""
        ...


def refuse_early(service: Service, request: ChatRequest | CompletionRequest) -> None:
    """Everything that can be refused before the prompt is encoded."""
    service.check_ready()
    service.check_model(request.model)
    service.unknown_fields.check(request.model_extra)
    check_combinations(request)


def submit(
    service: Service,
    http: Request,
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[list[int]],
) -> Generation:
    """Queues every choice of every prompt, or raises; choices of a prompt differ by their seed."""
    skip = to_skip_params(request, service.skip_defaults, service.skip_profile)
    if request.truncate_prompt_tokens is not None:
        prompts = [prompt[-request.truncate_prompt_tokens :] for prompt in prompts]
    sequences = []
    for prompt_ids in prompts:
        params = to_sampling_params(
            request,
            num_prompt_tokens=len(prompt_ids),
            info=service.engine.info,
            defaults=service.sampling_defaults,
            eos_token_ids=service.tokenizer.eos_token_ids,
            skip=skip,
        )
        for index in range(request.n or 1):
            seed = (params.seed + index) % 2**63
            sequences.append((prompt_ids, replace(params, seed=seed)))
    streams = service.engine.submit_all(sequences)
    recorder = http.state.recorder
    num_prompt_tokens = sum(map(len, prompts))
    recorder.submitted(num_prompt_tokens)
    return Generation(
        [
            Choice(index, stream, _detokenizer(service, request))
            for index, stream in enumerate(streams)
        ],
        n=request.n or 1,
        num_prompt_tokens=num_prompt_tokens,
        recorder=recorder,
        lifecycle=service.lifecycle,
    )


async def answer(
    http: Request,
    request: ChatRequest | CompletionRequest,
    generation: Generation,
    form: AnswerForm,
) -> Response:
    """The response. Until the engine's first output, failures still have a status of their own."""
    deltas = generation.deltas()
    try:
        if not request.stream:
            return await unless_disconnected(http.receive, _whole(generation, deltas, form))
        first = await unless_disconnected(http.receive, anext(deltas))
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, ClientDisconnectedError):
            reply = reply_to(error)
            generation.fail(reply.status, reply.message)
        generation.close()
        raise
    options = request.stream_options or StreamOptions()
    # A client that leaves while an event is being sent reaches only the background task.
    return event_stream(
        _events(generation, first, deltas, form, options), BackgroundTask(generation.close)
    )


async def _whole(
    generation: Generation, deltas: AsyncIterator[Delta], form: AnswerForm
) -> Response:
    parts: list[list[Delta]] = [[] for _ in generation.choices]
    async for delta in deltas:
        parts[delta.index].append(delta)
    content = form.whole([_joined(part) for part in parts])
    generation.succeed()
    return json_response(content | {"usage": _usage(generation)})


async def _events(
    generation: Generation,
    first: Delta,
    rest: AsyncIterator[Delta],
    form: AnswerForm,
    options: StreamOptions,
) -> AsyncGenerator[bytes, None]:
    def chunk_event(chunk: dict[str, Any]) -> bytes:
        if options.include_usage:
            so_far = _usage(generation) if options.continuous_usage_stats else None
            chunk["usage"] = so_far
        return event(chunk)

    try:
        for chunk in form.opening():
            yield chunk_event(chunk)
        async for delta in _chained(first, rest):
            if delta.text or delta.finish_reason:
                for chunk in form.chunks(delta):
                    yield chunk_event(chunk)
        if options.include_usage:
            yield event(form.usage_chunk() | {"usage": _usage(generation)})
        generation.succeed()  # before the client knows, who may ask for the metrics next
        yield DONE
    except Exception as error:
        log_failure(error)
        reply = reply_to(error)
        generation.fail(200, reply.message)
        yield event(reply.body)
    finally:
        generation.close()


async def _chained(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield first
    async for delta in rest:
        yield delta


def _joined(deltas: Sequence[Delta]) -> Delta:
    last = deltas[-1]
    return Delta(
        last.index,
        "".join(delta.text for delta in deltas),
        tuple(i for delta in deltas for i in delta.token_ids),
        tuple(pair for delta in deltas for pair in delta.logprobs),
        tuple(layers for delta in deltas for layers in delta.skipped_layers),
        last.finish_reason,
    )


def _usage(generation: Generation) -> dict[str, Any]:
    choices = generation.choices
    return usage(
        generation.num_prompt_tokens,
        sum(choice.num_tokens for choice in choices),
        [choice.skip_usage for choice in choices],
        num_cached_tokens=generation.num_cached_tokens,
    )


def _detokenizer(service: Service, request: ChatRequest | CompletionRequest) -> Detokenizer:
    return Detokenizer(
        service.tokenizer,
        stop=tuple(request.stop or ()),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        min_tokens=request.min_tokens or 0,
    )


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, or ClientDisconnectedError as soon as the client leaves: a handler is
    not cancelled for that by itself."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnectedError
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
