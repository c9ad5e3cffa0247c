"""One row being generated. All per-sequence state lives here, so finishing drops it whole."""

from __future__ import annotations

import time
from enum import Enum
from typing import TYPE_CHECKING

from skipllm_core.types import ROWS_PER_NEURON, SamplingParams, SkipUsage

if TYPE_CHECKING:  # its libraries would be loaded for `--help`, too
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
        # Of the prompt, the most that was ever computed: what was told of these tokens is not told
        # again when a preemption has them computed anew.
        self.num_told_prompt_tokens = 0
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
        self.num_skippable_tokens = 0  # that usage counts: decoded ones, or as if decoded
        self.num_skipped_ffn_blocks = 0
        self.num_left_out_neuron_rows = 0  # of blocks that were not skipped

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
    def is_prompt_only(self) -> bool:
        """Whether nothing is generated behind the prompt."""
        return self.params.max_tokens == 0

    @property
    def is_at_its_end(self) -> bool:
        """Whether the steps in flight sample its last token, whatever that will be."""
        return len(self.token_ids) + self.num_pending_tokens >= self.max_num_tokens

    @property
    def num_given_tokens(self) -> int:
        """Tokens at the start that count as the prompt where skipping is decided; those behind
        them are generated, or computed as if they had been."""
        return 1 if self.skip.prompt else self.num_prompt_tokens

    @property
    def is_warming_up(self) -> bool:
        """Whether the token generated next falls into the warm-up, and so is decoded in full."""
        return self.num_tokens - self.num_given_tokens < self.skip.warmup_tokens

    @property
    def awaits_mask(self) -> bool:
        """Whether somebody has to make the mask for its next token."""
        grammar = self.grammar
        is_going_on = self.status is not SeqStatus.FINISHED
        return is_going_on and grammar is not None and not grammar.is_ready

    @property
    def has_exact_prompt(self) -> bool:
        """Whether K and V of the prompt are the full model's, and may be shared."""
        return self.skip.policy == "never" or not (
            self.skip.prompt or self.skip.policy == "layer_drop"
        )

    @property
    def num_findable_tokens(self) -> int:
        """Tokens at the start of the prompt that need not be computed where the prefix cache has
        them. The last is computed to sample from, and in a prompt that is scored every token whose
        successor's log-probability has not been told."""
        if not self.has_exact_prompt:
            return 0
        most = self.num_prompt_tokens - 1
        if self.params.prompt_logprobs is not None:
            most = min(most, self.num_told_prompt_tokens)
        return most

    def skip_usage(self, num_layers: int, num_neurons: int) -> SkipUsage:
        total_ffn_blocks = self.num_skippable_tokens * num_layers
        rows_of_block = ROWS_PER_NEURON * num_neurons
        return SkipUsage(
            skipped_ffn_blocks=self.num_skipped_ffn_blocks,
            total_ffn_blocks=total_ffn_blocks,
            skipped_ffn_rows=self.num_skipped_ffn_blocks * rows_of_block
            + self.num_left_out_neuron_rows,
            total_ffn_rows=total_ffn_blocks * rows_of_block,
            warmup_tokens=min(self.num_tokens - self.num_given_tokens, self.skip.warmup_tokens)
            if self.skip.policy != "never"
            else 0,
        )
