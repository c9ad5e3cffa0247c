"""Stand-ins that make every property of the engine and the server a fast test."""

from __future__ import annotations

import time
from collections.abc import Callable

from skipllm_core.engine.runner import Batch, RowResult, ScheduledSeq, StepResult
from skipllm_core.sequence import Sequence

NextToken = Callable[[Sequence], int]


def count_up(seq: Sequence) -> int:
    """The token after the last one, within the printable bytes: a text one can predict."""
    return 32 + (seq.token_ids[-1] - 31) % 95


class FakeRunner:
    """A model of no weights: the next token is a function of the sequence.

    Skips as told: after the warm-up, every decode step of a sequence whose policy is not `never`
    skips the last `num_skipped` layers of its skippable region. `fail` may raise, or sleep.
    """

    def __init__(
        self,
        next_token: NextToken = count_up,
        *,
        num_layers: int = 4,
        vocab_size: int = 320,
        num_kv_blocks: int = 256,
        block_size: int = 16,
        num_skipped: int = 1,
        step_s: float = 0.0,
        fail: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.num_layers = num_layers
        self.vocab_size = vocab_size
        self.num_kv_blocks = num_kv_blocks
        self.block_size = block_size
        self.batches: list[Batch] = []
        self._next_token = next_token
        self._num_skipped = num_skipped
        self._step_s = step_s
        self._fail = fail

    def run(self, batch: Batch) -> StepResult:
        self._fail(batch)
        self.batches.append(batch)
        if self._step_s:
            time.sleep(self._step_s)
        rows = tuple(self._row(batch, row) for row in batch.rows)
        if batch.kind == "prefill":
            return StepResult(rows)
        common = set(range(self.num_layers)).intersection(*(row.skipped_layers for row in rows))
        return StepResult(rows, self.num_layers - len(common), len(common))

    def _row(self, batch: Batch, row: ScheduledSeq) -> RowResult:
        seq = row.seq
        if not row.samples:
            return RowResult(None)
        skipped: tuple[int, ...] = ()
        if batch.kind == "decode" and seq.skip.policy != "never" and not seq.is_warming_up:
            skipped = tuple(range(seq.skip.cold_start, seq.skip.cold_end))[-self._num_skipped :]
        return RowResult(self._next_token(seq), skipped_layers=skipped)
