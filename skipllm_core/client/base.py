"""`EngineClient`: what the server and Python users hold of an engine."""

from __future__ import annotations

import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from skipllm_core.client.stream import RequestStream
from skipllm_core.engine.block_manager import max_cached_tokens
from skipllm_core.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
)
from skipllm_core.messages import Abort, Add, Command
from skipllm_core.skip.resolve import check_runnable
from skipllm_core.types import (
    EngineHealth,
    EngineInfo,
    EngineState,
    SamplingParams,
    StepOutput,
    StepStats,
)

logger = logging.getLogger(__name__)


class EngineClient(ABC):
    """Token ids to an engine that runs elsewhere, and back. Belongs to one event loop.

    The engine admits in the order of `submit`; how much may wait for it is bounded here, so that
    refusing costs nothing but a look at the streams.
    """

    info: EngineInfo  # from start() on

    def __init__(self, *, max_num_queued_reqs: int, max_queued_tokens: int) -> None:
        self.on_step: list[Callable[[StepStats], None]] = []
        self._max_num_queued_reqs = max_num_queued_reqs
        self._max_queued_tokens = max_queued_tokens
        self._health = EngineHealth("starting")
        self._streams: dict[int, RequestStream] = {}  # the unfinished ones
        self._seq_ids = itertools.count()

    @abstractmethod
    async def start(self) -> None:
        """Returns when the engine is ready; raises ConfigError with the reason if it cannot be.

        A start that is cancelled leaves nothing behind.
        """

    @abstractmethod
    async def close(self) -> None:
        """Stops the engine. Open streams end with EngineDeadError. May be called more than once."""

    @abstractmethod
    def _post(self, command: Command) -> None:
        """Sends a command on its way, without waiting."""

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    def health(self) -> EngineHealth:
        return self._health

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> RequestStream:
        """Queues a sequence, or refuses it at once.

        Raises ContextLengthError and InvalidRequestError for what can never run, OverloadedError
        when there is no room just now, EngineDeadError when there is no engine any more.
        """
        (stream,) = self.submit_all([(prompt_ids, params)])
        return stream

    def submit_all(
        self, requests: Sequence[tuple[list[int], SamplingParams]]
    ) -> list[RequestStream]:
        """`submit` for several sequences, all or none."""
        self._refuse_unless_ready()
        for prompt_ids, params in requests:
            self._refuse_impossible(prompt_ids, params)
        self._refuse_beyond_capacity(len(requests), sum(len(ids) for ids, _ in requests))
        streams = []
        for prompt_ids, params in requests:
            stream = RequestStream(next(self._seq_ids), len(prompt_ids), self._on_stream_closed)
            self._post(Add(stream.seq_id, prompt_ids, params, time.monotonic()))
            self._streams[stream.seq_id] = stream
            streams.append(stream)
        return streams

    def _refuse_unless_ready(self) -> None:
        state = self._health.state
        if state == "dead":
            raise EngineDeadError("the engine has stopped")
        if state != "ready":
            raise OverloadedError(f"the engine is not accepting requests just now ({state})")

    def _refuse_impossible(self, prompt_ids: list[int], params: SamplingParams) -> None:
        info = self.info
        num_prompt_tokens = len(prompt_ids)
        if num_prompt_tokens == 0:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        if num_prompt_tokens + min(1, params.max_tokens) > info.max_model_len:
            raise ContextLengthError(
                max_model_len=info.max_model_len, num_prompt_tokens=num_prompt_tokens
            )
        if params.max_tokens < 0:
            raise InvalidRequestError("max_tokens must not be negative", param="max_tokens")
        # An id outside the vocabulary would fail the forward of everyone in its batch.
        _refuse_unknown_ids("prompt", (min(prompt_ids), max(prompt_ids)), info.vocab_size)
        _refuse_unknown_ids("logit_bias", (i for i, _ in params.logit_bias), info.vocab_size)
        check_runnable(params.skip.policy, info.skip_policies)
        num_tokens = max_cached_tokens(num_prompt_tokens, params.max_tokens, info.max_model_len)
        if num_tokens > info.num_kv_blocks * info.block_size:
            raise InvalidRequestError(
                f"prompt and max_tokens need a KV cache of {num_tokens} tokens; this server's "
                f"holds {info.num_kv_blocks * info.block_size}",
                param="max_tokens",
            )

    def _refuse_beyond_capacity(self, num_seqs: int, num_tokens: int) -> None:
        most = self.info.max_num_seqs + self._max_num_queued_reqs
        if num_seqs > most:
            raise InvalidRequestError(
                f"the request is for {num_seqs} sequences; this server takes at most {most}"
            )
        if self.num_unfinished + num_seqs > most:
            raise OverloadedError("too many requests are waiting; try again later")
        queued = sum(s.num_prompt_tokens for s in self._streams.values() if s.is_queued)
        if queued and queued + num_tokens > self._max_queued_tokens:
            raise OverloadedError("too many prompt tokens are waiting; try again later")

    def _on_stream_closed(self, stream: RequestStream) -> None:
        if self._streams.pop(stream.seq_id, None):
            self._post(Abort(stream.seq_id))

    def _on_step_output(self, step: StepOutput) -> None:
        for output in step.outputs:
            stream = self._streams.get(output.seq_id)
            if stream is None:
                continue  # closed; its abort is on the way
            if output.finish_reason is not None:
                del self._streams[output.seq_id]
            stream.push(output)
        if step.stats is not None:
            for callback in self.on_step:
                callback(step.stats)

    def _set_health(self, state: EngineState, detail: str = "") -> None:
        if state != self._health.state:
            level = logging.INFO if state == "ready" else logging.WARNING
            logger.log(level, "engine %s%s", state, f": {detail}" if detail else "")
        self._health = EngineHealth(state, detail)

    def _fail_streams(self, reason: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineDeadError(reason))


def _refuse_unknown_ids(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"Invalid '{param}': token id {token_id} is out of vocabulary, which has the ids "
                f"0 to {vocab_size - 1}.",
                param=param,
                code="invalid_value",
            )
