"""Which sequences the next step computes, and how many tokens of each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from skipllm_core.engine.block_manager import BlockManager
from skipllm_core.engine.runner import Batch, ScheduledSeq
from skipllm_core.sequence import SeqStatus, Sequence
from skipllm_core.types import StepKind

# Beside running streams, which wait for each of its steps, a prompt is spread over this many: a
# short one delays them hardly, a long one is not starved by them. No step takes more than a share
# of the token budget, so there is a longest wait.
INTERLEAVED_STEPS = 11
INTERLEAVED_SHARE = 4


class Scheduler:
    """Continuous batching, first come first served.

        running: [ oldest ........ latest ]   hold blocks: prefilling in chunks, or decoding
        waiting: [ next .......... latest ]   hold none: new, or preempted

    Every running sequence arrived before every waiting one: admission takes from the front of
    `waiting`, preemption returns the latest running one there. So the oldest can always take the
    blocks it needs, and every sequence finishes.

    A step is either a prefill (chunks of several prompts, up to the token budget) or a decode (one
    token for every prefilled row), never both: a mixed step would read every FFN anyway. They take
    turns while there is work for both, so a running stream waits for one prefill step at most, and
    that one is short. No stream of newcomers stops it, nor does any number of streams stop a
    prompt. Prompts are computed in their order too, so that only the latest running one can be
    computed in part.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        min_prefill_tokens: int,
        needs_masks_first: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert 0 < max_num_seqs <= max_num_batched_tokens, "a decode step has to fit the budget"
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0  # of the last schedule(), as the next two:
        self.num_prefix_cache_queries = 0  # prompt tokens of the sequences it admitted first
        self.num_prefix_cache_hits = 0  # those that need not be computed
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._min_prefill_tokens = min_prefill_tokens
        self._needs_masks_first = needs_masks_first
        self._clock = clock
        self._last_kind: StepKind = "decode"
        self._is_counted = False  # whether a batch bore the three numbers above

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forgets a sequence, whatever it was doing, and takes its blocks back."""
        if seq.status is SeqStatus.RUNNING:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self.blocks.release(seq)
        seq.status = SeqStatus.FINISHED

    def schedule(self) -> Batch | None:
        """The next step, with room in the block tables for it; None when there is no work, or none
        before tokens in flight are read."""
        if self._is_counted:
            self.num_preemptions = self.num_prefix_cache_queries = self.num_prefix_cache_hits = 0
        self._is_counted = False
        if not self.running and not self.waiting:
            return None
        batch = (
            self._decode() or self._prefill()
            if self._last_kind == "prefill"
            else self._prefill() or self._decode()
        )
        if batch is None:
            is_waiting = any(
                seq.num_pending_tokens or not self._is_due(seq)
                for seq in (*self.running, *self.waiting)
            )
            assert is_waiting, "the oldest sequence can always go on"
            return None
        self._is_counted = True
        self._last_kind = batch.kind
        return batch

    def _prefill(self) -> Batch | None:
        num_decoding = sum(seq.is_prefilled for seq in self.running)
        seq = self.running[-1] if self.running else None
        if seq is None or seq.is_prefilled:
            seq = self._admit_next()
        budget = self._max_num_batched_tokens
        if seq is not None and num_decoding:
            budget = self._interleaved_tokens(seq, num_decoding)
        rows: list[ScheduledSeq] = []
        while seq is not None:
            rows.append(ScheduledSeq(seq, min(budget, _num_left_to_prefill(seq))))
            budget -= rows[-1].num_tokens
            seq = self._admit_next() if budget else None
        return Batch("prefill", tuple(rows)) if rows else None

    def _interleaved_tokens(self, seq: Sequence, num_decoding: int) -> int:
        """Of a prefill step that begins with `seq`, beside `num_decoding` streams."""
        most = max(1, self._max_num_batched_tokens // INTERLEAVED_SHARE)
        # Where more prompts could run than streams do, spreading would only keep the batch small.
        num_free = self._max_num_seqs - len(self.running)
        if 1 + min(len(self.waiting), num_free) > num_decoding:
            return most
        # As many tokens as there are streams cost no more than one of their own steps.
        least = max(self._min_prefill_tokens, num_decoding)
        part = -(-(seq.num_tokens - seq.num_cached_tokens) // INTERLEAVED_STEPS)
        return min(max(part, least), most)

    def _admit_next(self) -> Sequence | None:
        """Lends the next waiting sequence blocks for all it has to prefill, if there is room."""
        if not self.waiting or len(self.running) >= self._max_num_seqs:
            return None
        seq = self.waiting[0]
        if seq.num_pending_tokens:  # preempted in flight: the token it waits for is kept
            return None
        num_tokens = _num_left_to_prefill(seq)
        prefix = self.blocks.find_prefix(seq)
        # One block to spare for every running sequence: a newcomer that takes the last one would
        # be preempted, and its prefill wasted, as soon as an older sequence fills a block.
        needed = self.blocks.num_taken(prefix, num_tokens) + len(self.running)
        if needed > self.blocks.num_free:
            return None
        self.blocks.share(seq, prefix)
        self.blocks.grow(seq, num_tokens)
        seq.num_computed_tokens = len(prefix) * self.blocks.block_size
        if seq.queue_s is None:
            seq.queue_s = self._clock() - seq.arrival_s
            self._count_cached(seq)
        seq.status = SeqStatus.RUNNING
        self.running.append(self.waiting.popleft())
        return seq

    def _count_cached(self, seq: Sequence) -> None:
        # Once per sequence: what a preempted one finds again is its own work, and no saving.
        seq.num_cached_tokens = seq.num_computed_tokens
        if self.blocks.enable_prefix_caching:
            self.num_prefix_cache_queries += seq.num_prompt_tokens
            self.num_prefix_cache_hits += seq.num_cached_tokens

    def _decode(self) -> Batch | None:
        rows = [
            ScheduledSeq(seq, 1)
            for seq in self.running  # oldest first; making room may take the latest off the list
            if seq.is_prefilled
            and not seq.is_at_its_end
            and self._is_due(seq)
            and self._make_room(seq)
        ]
        return Batch("decode", tuple(rows)) if rows else None

    def _is_due(self, seq: Sequence) -> bool:
        """Whether the mask that a row under a grammar is sampled with is there, or will be in time.

        A step that is launched ahead takes its masks along, so such rows wait for their last token
        and what is made of it, and the others do not wait for them.
        """
        grammar = seq.grammar
        if grammar is None or (grammar.is_ready and not seq.num_pending_tokens):
            return True
        return not self._needs_masks_first and not grammar.is_late

    def _make_room(self, seq: Sequence) -> bool:
        """Lends the block for the newest token; False if the sequence itself had to give way."""
        num_tokens = seq.num_computed_tokens + 1
        while num_missing := self.blocks.num_missing(seq, num_tokens):
            if num_missing <= self.blocks.num_free:
                self.blocks.grow(seq, num_tokens)
            elif self._preempt_latest() is seq:
                return False
        return True

    def _preempt_latest(self) -> Sequence:
        seq = self.running.pop()
        self.blocks.release(seq)
        seq.num_computed_tokens = 0
        seq.status = SeqStatus.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(seq)
        return seq


def _num_left_to_prefill(seq: Sequence) -> int:
    """Tokens to compute before decoding.

    The first token generated is sampled from the whole prompt. A preempted sequence has tokens
    already: all but its newest are recomputed, and a decode step goes on from that one, as it
    would have without the preemption.
    """
    num_to_prefill = seq.num_tokens - (seq.num_output_tokens > 0)
    return num_to_prefill - seq.num_computed_tokens
