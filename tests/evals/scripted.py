"""A backend whose answers are known beforehand, and what it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from skipllm_core.evals.records import FULL, Record, Setting, Timing
from skipllm_core.evals.tasks import Item

SKIPPING = Setting(policy="ffn_skip", ratio=0.25)
ITEMS = [
    Item(task="factoid_qa", id=str(n), group="all", turns=(f"q{n}",), accepted=(f"a{n}",))
    for n in range(4)
]
PLAN = [(FULL, ITEMS), (SKIPPING, ITEMS)]


class Scripted:
    """Right at every item under the full model, at half of them when skipping."""

    def __init__(self, fails_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.budgets: dict[str, int | None] = {}
        self._fails_after = fails_after

    def lead(
        self, items: Sequence[Item], setting: Setting, budget_tokens: int | None = None
    ) -> Iterator[Record | Timing]:
        self.budgets[setting.policy] = budget_tokens
        for item in items:
            if len(self.asked) == self._fails_after:
                raise KeyboardInterrupt
            self.asked.append(item.id)
            is_right = setting == FULL or int(item.id) % 2 == 0
            yield Record(
                setting=setting,
                task=item.task,
                item_id=item.id,
                answers=(f"a{item.id}" if is_right else "wrong",),
                num_tokens=5 + int(item.id),
                skipped_ffn_blocks=0 if setting == FULL else 3,
                total_ffn_blocks=12,
            )
        yield Timing(
            setting=setting,
            task=items[0].task,
            num_tokens=10,
            duration_s=2.0,
            ffn_weight_reads=9,
            ffn_weight_reads_avoided=1,
        )
