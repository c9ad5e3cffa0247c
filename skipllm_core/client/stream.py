"""One request's outputs, from the engine's pace to the reader's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from skipllm_core.errors import EngineDeadError
from skipllm_core.types import SeqOutput


class RequestStream:
    """An async iterator of `SeqOutput`, made by `EngineClient.submit`; for one reader.

    Ends after the output that bears a `finish_reason`, or with EngineDeadError. A reader that lags
    finds everything it missed merged into one output, so nothing queues up behind it.
    """

    def __init__(
        self, seq_id: int, num_prompt_tokens: int, on_close: Callable[[RequestStream], None]
    ) -> None:
        self.seq_id = seq_id
        self.num_prompt_tokens = num_prompt_tokens
        self.is_queued = True  # until the first output
        self._on_close = on_close
        self._pending: SeqOutput | None = None
        self._error: EngineDeadError | None = None
        self._is_finished = False  # no output will follow the pending one
        self._changed = asyncio.Event()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> SeqOutput:
        await self._changed.wait()
        if (output := self._pending) is not None:
            self._pending = None
            if not self._is_finished:
                self._changed.clear()
            return output
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def close(self) -> None:
        """Aborts the sequence if it is unfinished, and ends the iteration. Never waits; may be
        called at any time and more than once."""
        self._pending = self._error = None
        if not self._is_finished:
            self._is_finished = True
            self._changed.set()
            self._on_close(self)

    # What follows is the client's side.

    def push(self, output: SeqOutput) -> None:
        self.is_queued = False
        self._pending = output if self._pending is None else _merged(self._pending, output)
        self._is_finished = output.finish_reason is not None
        self._changed.set()

    def fail(self, error: EngineDeadError) -> None:
        self._error = error
        self._is_finished = True
        self._changed.set()


def _merged(earlier: SeqOutput, later: SeqOutput) -> SeqOutput:
    return replace(
        later,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=earlier.logprobs + later.logprobs,
        prompt_logprobs=earlier.prompt_logprobs + later.prompt_logprobs,
        skipped_layers=earlier.skipped_layers + later.skipped_layers,
        skipped_neurons=earlier.skipped_neurons + later.skipped_neurons,
        queue_s=later.queue_s if earlier.queue_s is None else earlier.queue_s,
        num_cached_tokens=later.num_cached_tokens
        if earlier.num_cached_tokens is None
        else earlier.num_cached_tokens,
    )
