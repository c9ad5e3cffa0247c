"""The consensus rule: rows of a batch skip together, so that weights are not read at all.

    layer      0 .. | .......... reached | reached + 1 .. cold_end - 1 | cold_end .. L-1
    FFN        run  | run, all watched   | skipped by every voter      | run

It is reached at the first layer where at least a share phi of the voters have triggered, there or
earlier, and every voter's similarity at that layer is no further than delta below its threshold. So
a row may skip although it has not triggered itself, and the loss is bounded by delta; and what a
row skips depends on its batch mates.

Voters are the rows that may skip in this step. The others do not vote: they run every layer (policy
`never`, warm-up), and so keep every layer's weights being read, or what their plan leaves.

Rows of the policy `neurons` leave the same neurons out, in `skip.neurons`.
"""

from __future__ import annotations

from collections.abc import Sequence

from skipllm_core.skip.policy import RowGate, SkipRule, may_trigger

SHARE_ROUNDING = 1e-3  # 0.28 of 25 rows are 7, whatever the bits of 0.28 say, here and on a device


class ConsensusGate(RowGate):
    """A `SkipGate` under the rule above: `share` is phi, `slack` delta. Voters are the rows under
    the adaptive rule."""

    def __init__(
        self, rows: Sequence[SkipRule | None], *, share: float = 0.5, slack: float = 0.01
    ) -> None:
        assert 0 <= share <= 1
        assert slack >= 0
        super().__init__(rows, leaves_out_together=True)
        self._share = share
        self._slack = slack
        self._have_voted: set[int] = set()

    def observe(self, layer: int, similarities: Sequence[float]) -> None:
        is_near = True
        for row, skip in self._watched.items():
            if not may_trigger(skip, layer):
                is_near = False  # it was not watched: nobody may speak for it
                continue
            if similarities[row] >= skip.threshold:
                self._have_voted.add(row)
            if not similarities[row] >= skip.threshold - self._slack:  # so does what is no number
                is_near = False
        wanted = self._share * len(self._watched) - SHARE_ROUNDING
        if is_near and len(self._have_voted) >= wanted:
            self._triggered, self._watched = self._watched, {}
