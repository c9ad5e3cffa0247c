"""What the routes work with, in one object: `app.state.service`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import HTTPError
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.protocol.extras import UnknownFields
from server.protocol.sampling import SamplingDefaults
from server.response_store import ResponseStore
from server.tools.style import ChatStyle
from skipllm_core.client import EngineClient
from skipllm_core.errors import ContextLengthError
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import SkipDefaults
from skipllm_core.tokenizer import Tokenizer

_INLINE_CHARS = 4096  # about a millisecond of tokenizing; more is done in a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    engine: EngineClient
    tokenizer: Tokenizer
    chat_style: ChatStyle
    model_name: str  # the one that answers bear
    model_aliases: tuple[str, ...]
    metrics: Metrics
    lifecycle: Lifecycle
    unknown_fields: UnknownFields
    sampling_defaults: SamplingDefaults
    skip_defaults: SkipDefaults
    skip_profile: SkipProfile | None
    responses: ResponseStore
    version: str
    created: int  # seconds since the epoch; the model card's, the same in every answer

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: while it stays the same, so do seeded answers."""
        return f"skipllm-{self.version}"

    def check_ready(self) -> None:
        """Raises HTTPError (503) while the engine cannot take requests, or is not to."""
        state = self.engine.health().state
        if self.lifecycle.is_draining:
            raise _unavailable("The server is shutting down.", retry_after_s=5)
        if state == "starting":
            raise _unavailable("The model is still being loaded.", retry_after_s=5)
        if state != "ready":
            raise _unavailable("The engine is not available just now.", retry_after_s=1)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name and name not in self.model_aliases:
            message = f"The model `{name[:200]}` does not exist or you do not have access to it."
            raise HTTPError(404, message, param="model", code="model_not_found")

    async def encode(self, num_chars: int, encode: Callable[[], list[int]]) -> list[int]:
        """Runs a tokenizer call, off the event loop unless it is short.

        `num_chars` bounds the tokens from below, so that what can never fit is refused before it
        is tokenized: raises ContextLengthError.
        """
        max_model_len = self.engine.info.max_model_len
        at_least = num_chars // self.tokenizer.max_token_chars
        if at_least > max_model_len:
            raise ContextLengthError(
                max_model_len=max_model_len, num_prompt_tokens=at_least, is_lower_bound=True
            )
        return encode() if num_chars <= _INLINE_CHARS else await asyncio.to_thread(encode)


def _unavailable(message: str, retry_after_s: int) -> HTTPError:
    headers = {"retry-after": str(retry_after_s)}
    return HTTPError(503, message, code="overloaded", headers=headers)
