"""Rows that trigger at different layers, and what a batch of them saves. No torch here.

A row that triggers early skips many blocks, and what rows skip ends at the same layer: their sets
are nested, and a batch of B rows leaves those of the row with the fewest unread.

    E[blocks saved] = sum over k >= 1 of P(a row skips at least k)^B
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TriggerSpread:
    """The number of blocks a row skips: normal around `middle`, rounded, between 0 and `most`; a
    share `never` of the rows does not trigger. (The numbers of docs/gpu.md, until a profile's.)"""

    middle: float
    most: int
    spread: float = 2.0
    never: float = 0.02

    def at_least(self, count: int) -> float:
        """P(a row skips at least `count` blocks)."""
        if count <= 0:
            return 1.0
        if count > self.most:
            return 0.0
        z = (count - 0.5 - self.middle) / self.spread
        return (1 - self.never) * 0.5 * math.erfc(z / math.sqrt(2))

    def expected_saved(self, batch: int) -> float:
        """E[blocks saved] of a step of so many rows."""
        return sum(self.at_least(count) ** batch for count in range(1, self.most + 1))

    def draw(self, batch: int, num_draws: int, seed: int = 0) -> list[list[int]]:
        """Blocks skipped by each row, for so many steps."""
        rng = random.Random(seed)  # noqa: S311

        def skipped() -> int:
            if rng.random() < self.never:
                return 0
            # Halves go up, as in `at_least`.
            return min(self.most, max(0, math.floor(rng.gauss(self.middle, self.spread) + 0.5)))

        return [[skipped() for _ in range(batch)] for _ in range(num_draws)]
