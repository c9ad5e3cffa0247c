"""A fake device: it computes steps in the order of their launches, and tells tokens when asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from skipllm_core.engine.runner import Batch, ScheduledSeq, StepResult
from skipllm_core.sequence import Sequence
from tests.fakes import FakeRunner


class LateFakeRunner(FakeRunner):
    """A FakeRunner that has for every sequence a twin on the device, which knows its newest tokens.

    Steps are computed on the twins. Where the engine would have a row computed without its input,
    or writes over blocks that a later step reads, the FakeRunner's cache does not fit. `fail_read`
    raises when a step's results are read, `fail` when it is launched.
    """

    def __init__(
        self, *, fail_read: Callable[[Batch], None] = lambda batch: None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.num_launched = 0
        self.num_unread = 0
        self.max_unread = 0
        self._fail_read = fail_read
        self._twins: WeakKeyDictionary[Sequence, Sequence] = WeakKeyDictionary()

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        rows = tuple(ScheduledSeq(self._twin(row.seq), row.num_tokens) for row in batch.rows)
        for row, twin in zip(batch.rows, rows, strict=True):
            assert row.samples == twin.samples, "host and device disagree on what is known"
            has_room = twin.seq.num_tokens < twin.seq.max_num_tokens
            assert has_room or not row.samples, "a known end is overrun"
        result = self.run(Batch(batch.kind, rows))
        for twin, out in zip(rows, result.rows, strict=True):
            if out.token_id is not None:
                twin.seq.token_ids.append(out.token_id)
        self.num_launched += 1
        step = self.num_launched
        self.num_unread += 1
        self.max_unread = max(self.max_unread, self.num_unread)

        def read() -> StepResult:
            self.num_unread = self.num_launched - step  # those before it were read or dropped
            self._fail_read(batch)
            return result

        return read

    def _twin(self, seq: Sequence) -> Sequence:
        twin = self._twins.get(seq)
        if twin is None:
            prompt_ids = seq.token_ids[: seq.num_prompt_tokens]
            twin = self._twins[seq] = Sequence(seq.seq_id, prompt_ids, seq.params)
            twin.max_num_tokens = seq.max_num_tokens
        assert twin.token_ids[: seq.num_tokens] == seq.token_ids
        assert twin.num_tokens == seq.num_tokens + seq.num_pending_tokens
        twin.num_computed_tokens = seq.num_computed_tokens
        twin.num_told_prompt_tokens = seq.num_told_prompt_tokens
        twin.block_table = list(seq.block_table)
        return twin
