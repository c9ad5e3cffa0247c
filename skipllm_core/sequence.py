"""One row being generated. All per-sequence state lives here, so finishing drops it whole."""

from __future__ import annotations

import time
from enum import Enum
from typing import TYPE_CHECKING

from skipllm_core.types import SamplingParams, SkipUsage

if TYPE_CHECKING:
    from skipllm_core.grammar.state import GrammarState


class SeqStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A prompt and what was generated for it, with its place in the KV cache.

        token_ids:   [ prompt ............ | output ...... | newest ]
                       0 .. num_computed_tokens-1 in cache   ^ its K/V not written yet

    After a finished prefill `num_computed_tokens == num_tokens - 1`: the newest token's K/V are
    written by the decode step that consumes it. After a preemption it is 0 again, and prompt and
    output are prefilled together (recompute). A prefill starts behind what the prefix cache has of
    the prompt.
    """

    def __init__(
        self,
        seq_id: int,
        prompt_ids: list[int],
        params: SamplingParams,
        arrival_s: float | None = None,
        max_model_len: int | None = None,
    ) -> None:
        assert prompt_ids, "a prompt has at least one token"
        self.seq_id = seq_id
        self.params = params
        self.skip = params.skip
        self.grammar: GrammarState | None = None  # set, where there is one, before it is scheduled
        self.token_ids = list(prompt_ids)
        self.num_prompt_tokens = len(prompt_ids)
        # Prompt and output can never be more than this; where it ends is known beforehand.
        self.max_num_tokens = len(prompt_ids) + params.max_tokens
        if max_model_len is not None:
            self.max_num_tokens = min(self.max_num_tokens, max_model_len)
        self.num_computed_tokens = 0
        # Output tokens that steps in flight are sampling: the device knows them, token_ids do not
        # yet. They count as computed on, and stand behind the newest of token_ids.
        self.num_pending_tokens = 0
        self.block_table: list[int] = []
        self.num_published_blocks = 0  # first ones of block_table that the prefix cache knows,
        self.content_id = 0  # and what it calls the content up to the last of them
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache when first scheduled
        self.status = SeqStatus.WAITING
        self.num_preemptions = 0
        self.arrival_s = time.monotonic() if arrival_s is None else arrival_s
        self.queue_s: float | None = None  # set when first scheduled
        self.num_decode_steps = 0
        self.num_skipped_ffn_blocks = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_prefilled(self) -> bool:
        """Whether the next step of this sequence is a decode step."""
        num_tokens = len(self.token_ids) + self.num_pending_tokens
        return num_tokens > self.num_prompt_tokens and self.num_computed_tokens == num_tokens - 1

    @property
    def is_at_its_end(self) -> bool:
        """Whether the steps in flight sample its last token, whatever that will be."""
        return len(self.token_ids) + self.num_pending_tokens >= self.max_num_tokens

    @property
    def is_warming_up(self) -> bool:
        """Whether the token generated next falls into the warm-up, and so is decoded in full."""
        return self.num_output_tokens < self.skip.warmup_tokens

    @property
    def awaits_mask(self) -> bool:
        """Whether somebody has to make the mask for its next token."""
        grammar = self.grammar
        is_going_on = self.status is not SeqStatus.FINISHED
        return is_going_on and grammar is not None and not grammar.is_ready

    @property
    def has_exact_prompt(self) -> bool:
        """Whether K and V of the prompt are the full model's, and may be shared."""
        return self.skip.policy != "layer_drop"

    def skip_usage(self, num_layers: int) -> SkipUsage:
        return SkipUsage(
            skipped_ffn_blocks=self.num_skipped_ffn_blocks,
            total_ffn_blocks=self.num_decode_steps * num_layers,
            warmup_tokens=min(self.num_output_tokens, self.skip.warmup_tokens)
            if self.skip.policy != "never"
            else 0,
        )
