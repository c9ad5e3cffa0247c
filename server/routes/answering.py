"""From a validated request to its answer, streaming and not: the same deltas, joined or one by one.

refuse -> encode -> submit -> first output of the engine -> 200 -> events, or one JSON object
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Sequence,
)
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from server.errors import (
    ClientDisconnectedError,
    ErrorReply,
    json_response,
    log_failure,
    reply_to,
)
from server.generation import Choice, Delta, Generation
from server.parts import AnswerParser, PlainParser
from server.protocol.base import GenerationRequest
from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.sampling import (
    check_combinations,
    check_prompt_logprobs,
    to_sampling_params,
    to_skip_params,
    truncated,
)
from server.service import Service
from server.sse import KEEP_ALIVE, event_stream
from server.tools.grammars import Constraint
from skipllm_core.detokenizer import Detokenizer

T = TypeVar("T")

HELD_S = 5.0  # how long a stream's response waits for the first output, before it begins without
_INLINE_PROMPT_TOKENS = 256  # whose log-probabilities are worded in a few milliseconds


class AnswerForm(Protocol):
    """How an endpoint words its answer, in one or as events. Implementations: one for each of the
    endpoints that generate."""

    def whole(self, answers: Sequence[Delta]) -> dict[str, Any]:
        """The answer in one; one joined delta for each choice."""
        ...

    def opening(self) -> Iterator[bytes]:
        """The events before the first delta."""
        ...

    def events(self, delta: Delta) -> Iterator[bytes]:
        """The events of a delta that has parts or ends a choice."""
        ...

    def closing(self) -> Iterator[bytes]:
        """The events after the last delta, the one that says so included."""
        ...

    def failure(self, reply: ErrorReply) -> bytes:
        """The event of a failure after the first event; nothing follows it."""
        ...


def refuse_early(service: Service, request: ChatRequest | CompletionRequest) -> None:
    """Everything that can be refused before the prompt is encoded."""
    service.check_ready()
    service.check_model(request.model)
    service.unknown_fields.check(request.model_extra)
    check_combinations(request)


async def encode_prompt(
    service: Service, request: GenerationRequest, num_chars: int, encode: Callable[[], list[int]]
) -> list[int]:
    """The prompt's tokens, as many as the request wants to use. Where it truncates, a text is not
    too long by its length alone."""
    if request.truncate_prompt_tokens is not None:
        return await asyncio.to_thread(lambda: truncated(request, encode()))
    return await service.encode(num_chars, encode)


def submit(
    service: Service,
    http: Request,
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[list[int]],
    new_parser: Callable[[], AnswerParser] = PlainParser,
    *,
    constraint: Constraint | None = None,
    shown_tokens: Collection[int] = (),
) -> Generation:
    """Queues every choice of every prompt, or raises; choices of a prompt differ by their seed, and
    all follow the constraint. Parsers see `shown_tokens` even where special ones are skipped."""
    skip = to_skip_params(request, service.skip_defaults, service.skip_profile, service.engine.info)
    check_prompt_logprobs(request, prompts)
    sequences = []
    for prompt_ids in prompts:
        params = to_sampling_params(
            request,
            num_prompt_tokens=len(prompt_ids),
            info=service.engine.info,
            defaults=service.sampling_defaults,
            eos_token_ids=service.tokenizer.eos_token_ids,
            skip=skip,
            grammar=constraint.grammar if constraint is not None else None,
        )
        for index in range(request.n or 1):
            seed = (params.seed + index) % 2**63
            sequences.append((prompt_ids, replace(params, seed=seed)))
    streams = service.engine.submit_all(sequences)
    recorder = http.state.recorder
    num_prompt_tokens = sum(map(len, prompts))
    recorder.submitted(num_prompt_tokens)
    detokenizers = (
        _detokenizer(service, request, prompt_ids, shown_tokens) for prompt_ids, _ in sequences
    )
    return Generation(
        [
            Choice(index, stream, detokenizer, new_parser())
            for index, (stream, detokenizer) in enumerate(zip(streams, detokenizers, strict=True))
        ],
        n=request.n or 1,
        num_prompt_tokens=num_prompt_tokens,
        grammar_param=constraint.param if constraint is not None else None,
        recorder=recorder,
        lifecycle=service.lifecycle,
    )


async def answer(
    http: Request, generation: Generation, form: AnswerForm, *, stream: bool
) -> Response:
    """The response. Until the engine's first output, failures still have a status of their own; of
    a stream for `HELD_S` at most, so that no proxy takes a long wait for a dead connection."""
    deltas = generation.deltas()
    first: asyncio.Future[Delta] | None = None
    try:
        if not stream:
            return await unless_disconnected(http.receive, _whole(generation, deltas, form))
        first = asyncio.ensure_future(anext(deltas))
        await unless_disconnected(http.receive, asyncio.wait({first}, timeout=HELD_S))
        if first.done():
            first.result()
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, ClientDisconnectedError):
            reply = reply_to(error)
            generation.fail(reply.status, reply.message)
        _abandon(generation, first)
        raise

    # A client that leaves while an event is being sent reaches only the background task.
    async def abandon() -> None:  # not in a thread, as plain functions are
        _abandon(generation, first)

    return event_stream(_events(generation, first, deltas, form), BackgroundTask(abandon))


def _abandon(generation: Generation, first: asyncio.Future[Delta] | None) -> None:
    """Ends what has not ended. May be called twice."""
    if first is not None and not first.cancel() and not first.cancelled():
        first.exception()  # nobody else may have asked
    generation.close()


async def _whole(
    generation: Generation, deltas: AsyncIterator[Delta], form: AnswerForm
) -> Response:
    parts: list[list[Delta]] = [[] for _ in generation.choices]
    async for delta in deltas:
        parts[delta.index].append(delta)
    answers = [_joined(part) for part in parts]
    content = await _worded(answers, lambda: json_response(form.whole(answers)))
    generation.succeed()
    return content


async def _events(
    generation: Generation,
    first: asyncio.Future[Delta],
    rest: AsyncIterator[Delta],
    form: AnswerForm,
) -> AsyncGenerator[bytes, None]:
    try:
        if not first.done():
            yield KEEP_ALIVE
        first_delta = await first
        for event in form.opening():
            yield event
        async for delta in _chained(first_delta, rest):
            if delta.parts or delta.finish_reason:
                for event in await _worded([delta], partial(_all_events, form, delta)):
                    yield event
        generation.succeed()  # before the client knows, who may ask for the metrics next
        for event in form.closing():
            yield event
    except Exception as error:
        log_failure(error)
        reply = reply_to(error)
        generation.fail(200, reply.message)
        yield form.failure(reply)
    finally:
        _abandon(generation, first)


async def _worded(deltas: Sequence[Delta], word: Callable[[], T]) -> T:
    """What `word` returns; off the event loop where there is much to say of prompts."""
    num_scored = sum(len(delta.prompt_logprobs) for delta in deltas)
    return await asyncio.to_thread(word) if num_scored > _INLINE_PROMPT_TOKENS else word()


def _all_events(form: AnswerForm, delta: Delta) -> list[bytes]:
    return list(form.events(delta))


async def _chained(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield first
    async for delta in rest:
        yield delta


def _joined(deltas: Sequence[Delta]) -> Delta:
    last = deltas[-1]
    return Delta(
        last.index,
        tuple(part for delta in deltas for part in delta.parts),
        tuple(i for delta in deltas for i in delta.token_ids),
        tuple(pair for delta in deltas for pair in delta.logprobs),
        tuple(offset for delta in deltas for offset in delta.text_offsets),
        tuple(layers for delta in deltas for layers in delta.skipped_layers),
        tuple(neurons for delta in deltas for neurons in delta.skipped_neurons),
        last.finish_reason,
        last.stopped_by,
        tuple(found for delta in deltas for found in delta.prompt_logprobs),
        last.end_logprobs,
    )


def _detokenizer(
    service: Service,
    request: ChatRequest | CompletionRequest,
    prompt_ids: Sequence[int],
    shown_tokens: Collection[int],
) -> Detokenizer:
    return Detokenizer(
        service.tokenizer,
        prompt_ids=prompt_ids,
        stop=tuple(request.stop or ()),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        shown_tokens=shown_tokens,
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
