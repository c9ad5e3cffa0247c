"""Where one sequence's text stands in its grammar, and which tokens may come next."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from llguidance import LLMatcher

from skipllm_core.grammar.compiler import Grammar
from skipllm_core.types import SamplingParams

SLOW_S = 0.01  # masks of a grammar that once took longer are made where they delay no others

DEAD_END = "no token is allowed here"


class GrammarState:
    """One sequence's way through its grammar.

        accept(token) -> [mask thread: fill()] -> mask() -> accept(token) -> ...

    A mask is a bit for each token of the logits, least significant bit first. It says all that
    there is to say of ends, `min_tokens` included: where the text may end, the sequence's stop
    tokens are allowed; where nothing else may follow, they, or else the model's end-of-sequence
    tokens, are allowed whatever the parameters say.
    """

    def __init__(self, grammar: Grammar, params: SamplingParams) -> None:
        self.error: str | None = None  # the text cannot go on
        self.is_complete = False  # the text is whole, and nothing may follow it
        self.is_slow = False
        self.is_late = False  # the last mask was asked for too early
        self._matcher: LLMatcher = grammar.matcher.deep_copy()
        self._params = params
        self._stops = [i for i in params.stop_token_ids if i < grammar.vocabulary.vocab_size]
        self._vocabulary = grammar.vocabulary
        self._can_only_end = False
        self._num_tokens = 0
        self._ready = threading.Event()
        self._finish(bytearray(grammar.first_mask))

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is there, or the error that took its place."""
        return self._ready.is_set()

    def mask(self, timeout_s: float | None = None) -> bytes | None:
        """Which tokens may come next; None if that is not known in time, or never (`error`)."""
        self.is_late = not self._ready.wait(timeout_s)
        return None if self.is_late or self.error is not None else self._mask

    def allows(self, token_id: int) -> bool:
        """Whether the last mask does."""
        return bool(self._mask[token_id >> 3] >> (token_id & 7) & 1)

    def ends_with(self, token_id: int) -> bool:
        """Whether this token, allowed by the last mask, ends the text without being part of it."""
        return token_id in self._stops or (
            self._can_only_end and token_id in self._vocabulary.eos_token_ids
        )

    def accept(self, token_id: int) -> None:
        """Moves on. Unless that completes the text, somebody has to `fill` the next mask."""
        assert self.is_ready, "its mask is still being made"
        self._ready.clear()
        self._num_tokens += 1
        try:
            if self._matcher.consume_token(token_id):
                self.is_complete = self._matcher.is_stopped()
            else:
                self._fail(self._matcher.get_error())
        except BaseException as error:  # what Rust panics with is no Exception
            self._fail(str(error))

    def fill(self) -> None:
        """Makes the next mask. In any thread, while nobody else does anything but wait for it."""
        start_s = time.thread_time()
        try:
            self._finish(bytearray(self._matcher.compute_bitmask()))
        except BaseException as error:  # what Rust panics with is no Exception
            self._fail(str(error))
        self.is_slow |= time.thread_time() - start_s > SLOW_S

    def _finish(self, mask: bytearray) -> None:
        if self._matcher.is_error():
            self._fail(self._matcher.get_error())
            return
        self._can_only_end = False
        if self._matcher.is_accepting():
            _set(mask, self._vocabulary.ends, False)
            self._can_only_end = not any(mask)
            _set(mask, self._stops, True)
        if self._can_only_end:
            _set(mask, self._stops or self._vocabulary.eos_token_ids, True)
        elif self._num_tokens < self._params.min_tokens:
            _set(mask, self._stops, False)
        if not any(mask):
            self._fail(DEAD_END)
            return
        self._mask = bytes(mask)
        self._ready.set()

    def _fail(self, error: str) -> None:
        self.error = error.splitlines()[0][:200] if error else DEAD_END
        self._ready.set()


def _set(mask: bytearray, token_ids: Sequence[int], value: bool) -> None:
    for token_id in token_ids:
        bit = 1 << (token_id & 7)
        if value:
            mask[token_id >> 3] |= bit
        else:
            mask[token_id >> 3] &= ~bit
