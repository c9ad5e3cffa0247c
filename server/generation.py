"""A request under way: its sequences' outputs, merged and turned into text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from server.errors import HTTPError
from server.guard import CLIENT_LEFT
from server.lifecycle import Lifecycle
from server.metrics import RequestMetrics
from server.parts import AnswerParser, Content, EndReason, Part, ToolCallBegin, Usage
from skipllm_core.client import RequestStream
from skipllm_core.detokenizer import Detokenizer
from skipllm_core.errors import InvalidRequestError, SkipLLMError
from skipllm_core.types import (
    FinishReason,
    LayerNeurons,
    SeqOutput,
    SkipUsage,
    TokenLogprobs,
    total_skip_usage,
)


class SequenceFailedError(SkipLLMError):
    """The engine gave up on one sequence."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What came anew for one choice. Tokens whose text is held back come with that text, so
    `parts`, `logprobs` and the rest belong together; all are empty while it is held."""

    index: int
    parts: tuple[Part, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()  # of the tokens that are text
    # Whole characters before each of the same tokens, and before the one that ended the answer.
    text_offsets: tuple[int, ...] = ()
    skipped_layers: tuple[tuple[int, ...], ...] = ()
    skipped_neurons: tuple[LayerNeurons, ...] = ()
    finish_reason: EndReason | None = None
    stopped_by: str | int | None = None  # the stop string or stop token that ended it
    # With the first delta that is not empty: of the prompt's tokens behind its first.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    # Of the token that ended the answer, which is no text.
    end_logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()

    @property
    def text(self) -> str:
        """The content among the parts."""
        return "".join(part.text for part in self.parts if isinstance(part, Content))


class Choice:
    """One sequence and what its text says."""

    def __init__(
        self, index: int, stream: RequestStream, detokenizer: Detokenizer, parser: AnswerParser
    ) -> None:
        self.stream = stream
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_cached_tokens = 0  # of its prompt
        self.skip_usage = SkipUsage()
        self.finish_reason: FinishReason | None = None
        self._has_tool_calls = False
        self._index = index
        self._detokenizer = detokenizer
        self._parser = parser
        self._held: list[SeqOutput] = []
        self._held_offsets: list[int] = []

    def take(self, output: SeqOutput) -> tuple[SeqOutput, Delta]:
        """Adds an output; returns it, cut where the answer ends before the sequence does, and what
        it means for the client."""
        parts, num_taken = self._read(output)
        if self._has_ended:
            self.stream.close()
            output = _cut(output, num_taken)
        elif output.finish_reason is not None:
            parts += self._parser.feed(self._detokenizer.flush())
        if output.finish_reason is not None:
            parts += self._parser.finish()
        self.num_tokens += len(output.token_ids)
        if output.num_cached_tokens is not None:
            self.num_cached_tokens = output.num_cached_tokens
        self.skip_usage = output.skip_usage or self.skip_usage
        self.finish_reason = output.finish_reason
        self._has_tool_calls |= any(isinstance(part, ToolCallBegin) for part in parts)
        self._held.append(output)
        if not parts and output.finish_reason is None:
            return output, Delta(self._index)
        held, self._held = self._held, []
        offsets, self._held_offsets = self._held_offsets, []
        has_called = output.finish_reason == "stop" and self._has_tool_calls
        return output, Delta(
            self._index,
            tuple(parts),
            tuple(i for part in held for i in part.token_ids),
            tuple(pair for part in held for pair in _logprobs_of_text(part)),
            tuple(offsets),
            tuple(layers for part in held for layers in part.skipped_layers),
            tuple(neurons for part in held for neurons in part.skipped_neurons),
            "tool_calls" if has_called else output.finish_reason,
            self._detokenizer.stopped_by or held[-1].stop_token_id,
            tuple(found for part in held for found in part.prompt_logprobs),
            _logprobs_of_end(output),
        )

    @property
    def _has_ended(self) -> bool:
        """At a stop string, or as the parser wants no more."""
        return self._detokenizer.stopped_by is not None or self._parser.is_finished

    def _read(self, output: SeqOutput) -> tuple[list[Part], int]:
        """The parts released, and how many tokens there are up to the answer's end. Stop strings
        end answers, not what is thought before."""
        num_text_tokens = len(output.token_ids) - (output.stop_token_id is not None)
        parts: list[Part] = []
        for position, token_id in enumerate(output.token_ids[:num_text_tokens]):
            self._held_offsets.append(self._detokenizer.num_chars)
            is_reasoning = self._parser.is_reasoning
            self.num_reasoning_tokens += is_reasoning
            text = self._detokenizer.add(token_id, is_searched=not is_reasoning)
            parts += self._parser.feed(text)
            if self._has_ended:
                return parts, position + 1
        if output.stop_token_id is not None:
            self._held_offsets.append(self._detokenizer.num_chars)
        return parts, len(output.token_ids)


class Generation:
    """All choices of one request, as one stream of deltas: `n` of every prompt, in their order.

    Whoever starts to iterate has to `close` it in the end: that aborts what is unfinished, and
    settles the request's metrics.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        *,
        n: int,
        num_prompt_tokens: int,
        grammar_param: str | None = None,
        recorder: RequestMetrics,
        lifecycle: Lifecycle,
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.choices = choices
        self._n = n
        self._grammar_param = grammar_param  # the request's field that a bad grammar came from
        self._recorder = recorder
        self._lifecycle = lifecycle
        self._was_interrupted = False
        lifecycle.begin(self)

    @property
    def usage(self) -> Usage:
        """So far. A prompt counts once, its cached tokens with what its first choice found: the
        others may find what that one has just computed."""
        return Usage(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=sum(c.num_cached_tokens for c in self.choices[:: self._n]),
            num_generated_tokens=sum(choice.num_tokens for choice in self.choices),
            num_reasoning_tokens=sum(choice.num_reasoning_tokens for choice in self.choices),
            skip=total_skip_usage(choice.skip_usage for choice in self.choices),
        )

    async def deltas(self) -> AsyncIterator[Delta]:
        """One delta for each output of the engine, empty ones included."""
        async for index, output in _merged([choice.stream for choice in self.choices]):
            if output.finish_reason == "error":
                raise self._failure(output)
            taken, delta = self.choices[index].take(output)
            self._recorder.output(taken)
            yield delta
        if self._was_interrupted:
            raise HTTPError(
                503, "The server is shutting down.", code="overloaded", headers={"retry-after": "5"}
            )
        assert all(choice.finish_reason for choice in self.choices), "a stream ended too early"

    def succeed(self) -> None:
        """The answer is complete."""
        reasons = {choice.finish_reason for choice in self.choices}
        self._finished(200, "length" if "length" in reasons else "stop")
        self.close()

    def fail(self, status: int, error: str) -> None:
        """The answer ended with an error, in a response of `status`."""
        self._finished(status, "error", error)
        self.close()

    def interrupt(self) -> None:
        self._was_interrupted = True
        self._close_streams()

    def close(self) -> None:
        """Ends it: without `succeed` or `fail` before, the client has left. Never waits; may be
        called more than once."""
        self._finished(CLIENT_LEFT, "abort")
        self._close_streams()
        self._lifecycle.end(self)

    def _failure(self, output: SeqOutput) -> SkipLLMError:
        if not output.is_request_fault:
            return SequenceFailedError(output.error)
        param = self._grammar_param
        message = f"Invalid '{param}': {output.error}"
        return InvalidRequestError(message, param=param, code="invalid_value")

    def _finished(self, status: int, reason: FinishReason, error: str | None = None) -> None:
        self._recorder.finished(
            status, reason, error, num_cached_tokens=self.usage.num_cached_tokens
        )

    def _close_streams(self) -> None:
        for choice in self.choices:
            choice.stream.close()


def _cut(output: SeqOutput, num_tokens: int) -> SeqOutput:
    """The output as if the sequence had ended with its first `num_tokens` tokens."""
    return replace(
        output,
        token_ids=output.token_ids[:num_tokens],
        logprobs=output.logprobs[:num_tokens],
        skipped_layers=output.skipped_layers[:num_tokens],
        skipped_neurons=output.skipped_neurons[:num_tokens],
        finish_reason="stop",
        stop_token_id=None,
    )


def _logprobs_of_text(output: SeqOutput) -> list[tuple[int, TokenLogprobs]]:
    pairs = list(zip(output.token_ids, output.logprobs, strict=False))
    return pairs[:-1] if output.stop_token_id is not None else pairs


def _logprobs_of_end(output: SeqOutput) -> tuple[tuple[int, TokenLogprobs], ...]:
    if output.stop_token_id is None:
        return ()
    return tuple((output.stop_token_id, found) for found in output.logprobs[-1:])


async def _merged(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, SeqOutput]]:
    """The outputs of all streams as they come, with the index of the stream."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    reads = {asyncio.ensure_future(_next(stream)): i for i, stream in enumerate(streams)}
    try:
        while reads:
            done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            for read in sorted(done, key=reads.__getitem__):
                index = reads.pop(read)
                output_or_end = read.result()
                if output_or_end is None:
                    continue
                yield index, output_or_end
                reads[asyncio.ensure_future(_next(streams[index]))] = index
    finally:
        for read in reads:
            read.cancel()


async def _next(stream: RequestStream) -> SeqOutput | None:
    return await anext(stream, None)
