"""The consensus rule: rows of a batch skip together, so that weights are not read at all.

    layer      0 .. | .......... reached | reached + 1 .. cold_end - 1 | cold_end .. L-1
    FFN        run  | run, all watched   | skipped by every voter      | run

It is reached at the first layer where at least a share phi of the voters have triggered, there or
earlier, and every voter's similarity at that layer is no further than delta below its threshold. So
a row may skip although it has not triggered itself, and the loss is bounded by delta; and what a
row skips depends on its batch mates.

Voters are the rows that may skip in this step. The others (policy `never`, warm-up) run every layer
and do not vote; they keep every layer's weights being read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from skipllm_core.skip.policy import may_skip, may_trigger
from skipllm_core.types import SkipParams

SHARE_ROUNDING = 1e-3  # 0.28 of 25 rows are 7, whatever the bits of 0.28 say, here and on a device


class ConsensusGate:
    """A `SkipGate` under the rule above: `share` is phi, `slack` delta. `rows` bears each voter's
    settings, None for the others."""

    def __init__(
        self, rows: Sequence[SkipParams | None], *, share: float = 0.5, slack: float = 0.01
    ) -> None:
        assert 0 <= share <= 1
        assert slack >= 0
        self.skipped_layers: list[list[int]] = [[] for _ in rows]
        self._rows = range(len(rows))
        self._voters = {row: skip for row, skip in enumerate(rows) if skip is not None}
        self._share = share
        self._slack = slack
        self._triggered: set[int] = set()
        self._is_reached = False

    def rows_to_run(self, layer: int) -> Collection[int]:
        if not self._is_reached:
            return self._rows
        return [row for row in self._rows if not self._skips(row, layer)]

    def _skips(self, row: int, layer: int) -> bool:
        skip, skipped = self._voters.get(row), self.skipped_layers[row]
        if skip is None or not may_skip(skip, layer, len(skipped)):
            return False
        skipped.append(layer)
        return True

    def watches(self, layer: int) -> bool:
        return not self._is_reached and any(
            may_trigger(skip, layer) for skip in self._voters.values()
        )

    def observe(self, layer: int, similarities: Sequence[float]) -> None:
        is_near = True
        for row, skip in self._voters.items():
            if not may_trigger(skip, layer):
                is_near = False  # it was not watched: nobody may speak for it
                continue
            if similarities[row] >= skip.threshold:
                self._triggered.add(row)
            if not similarities[row] >= skip.threshold - self._slack:  # so does what is no number
                is_near = False
        wanted = self._share * len(self._voters) - SHARE_ROUNDING
        has_votes = len(self._triggered) >= wanted
        self._is_reached = self._is_reached or (is_near and has_votes)
