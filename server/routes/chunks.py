"""The events of OpenAI's two older streams: chunks with one `usage` rule, then `[DONE]`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from server.errors import ErrorReply
from server.generation import Generation
from server.parts import Usage
from server.protocol.answers import usage_block
from server.protocol.base import StreamOptions
from server.sse import DONE, event


class ChunkStream:
    """Chunks of one answer, as events. `head` is what all of them share."""

    def __init__(
        self, head: dict[str, Any], generation: Generation, options: StreamOptions | None
    ) -> None:
        self._head = head
        self._generation = generation
        self._options = options or StreamOptions()

    def chunk(self, choice: dict[str, Any], *, is_opening: bool = False, **more: Any) -> bytes:
        """A chunk of one choice. Where usage is asked for, each has it, or null till the end;
        before the first token is sent, none is counted."""
        content = {**self._head, "choices": [choice], **more}
        if self._options.include_usage:
            usage = self._generation.usage
            if is_opening:
                usage = Usage(
                    num_prompt_tokens=usage.num_prompt_tokens,
                    num_cached_tokens=usage.num_cached_tokens,
                )
            is_told = self._options.continuous_usage_stats
            content["usage"] = usage_block(usage) if is_told else None
        return event(content)

    def closing(self) -> Iterator[bytes]:
        if self._options.include_usage:
            usage = usage_block(self._generation.usage)
            yield event({**self._head, "choices": [], "usage": usage})
        yield DONE


def failure(reply: ErrorReply) -> bytes:
    """A stream that fails ends with the error object, and without `[DONE]`."""
    return event(reply.body)
