"""Which sequences the next step computes, and how many tokens of each."""

from __future__ import annotations

import time
from collections import deque

from skipllm_core.engine.block_manager import BlockManager
from skipllm_core.engine.runner import Batch, ScheduledSeq
from skipllm_core.sequence import SeqStatus, Sequence
from skipllm_core.types import StepKind


class Scheduler:
    """Continuous batching, first come first served.

        running: [ oldest ........ latest ]   hold blocks: prefilling in chunks, or decoding
        waiting: [ next .......... latest ]   hold none: new, or preempted

    Every running sequence arrived before every waiting one: admission takes from the front of
    `waiting`, preemption returns the latest running one there. So the oldest can always take the
    blocks it needs, and every sequence finishes.

    A step is either a prefill (chunks of several prompts, up to the token budget) or a decode (one
    token for every prefilled row), never both: a mixed step would read every FFN anyway. They take
    turns while there is work for both, so a running stream waits for one prefill step at most.
    """

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        assert 0 < max_num_seqs <= max_num_batched_tokens, "a decode step has to fit the budget"
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0  # of the last schedule()
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._last_kind: StepKind = "decode"

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
        """The next step, with room in the block tables for it; None when there is no work."""
        self.num_preemptions = 0
        if not self.running and not self.waiting:
            return None
        batch = (
            self._decode() or self._prefill()
            if self._last_kind == "prefill"
            else self._prefill() or self._decode()
        )
        assert batch is not None, "the oldest sequence can always go on"
        self._last_kind = batch.kind
        return batch

    def _prefill(self) -> Batch | None:
        budget = self._max_num_batched_tokens
        rows: list[ScheduledSeq] = []
        for seq in self.running:
            if budget and not seq.is_prefilled:
                rows.append(ScheduledSeq(seq, min(budget, _num_left_to_prefill(seq))))
                budget -= rows[-1].num_tokens
        while budget and self.waiting and self._can_admit(self.waiting[0]):
            seq = self._admit()
            rows.append(ScheduledSeq(seq, min(budget, _num_left_to_prefill(seq))))
            budget -= rows[-1].num_tokens
        return Batch("prefill", tuple(rows)) if rows else None

    def _can_admit(self, seq: Sequence) -> bool:
        # One block to spare for every running sequence: a newcomer that takes the last one would
        # be preempted, and its prefill wasted, as soon as an older sequence fills a block.
        needed = self.blocks.num_blocks_for(_num_left_to_prefill(seq)) + len(self.running)
        return len(self.running) < self._max_num_seqs and needed <= self.blocks.num_free

    def _admit(self) -> Sequence:
        seq = self.waiting.popleft()
        self.blocks.grow(seq, _num_left_to_prefill(seq))
        seq.status = SeqStatus.RUNNING
        if seq.queue_s is None:
            seq.queue_s = time.monotonic() - seq.arrival_s
        self.running.append(seq)
        return seq

    def _decode(self) -> Batch | None:
        rows = [
            ScheduledSeq(seq, 1)
            for seq in tuple(self.running)  # oldest first; making room may preempt the later ones
            if seq.status is SeqStatus.RUNNING and seq.is_prefilled and self._make_room(seq)
        ]
        return Batch("decode", tuple(rows)) if rows else None

    def _make_room(self, seq: Sequence) -> bool:
        """Lends the block for the newest token; False if the sequence itself had to give way."""
        while self.blocks.num_missing(seq, seq.num_tokens) > self.blocks.num_free:
            if self._preempt_latest() is seq:
                return False
        self.blocks.grow(seq, seq.num_tokens)
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
