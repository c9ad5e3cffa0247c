"""Which row of the device's tensors a decoding sequence has."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

from skipllm_core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SlotChanges:
    """What the next step changes, to be done in this order."""

    moved: tuple[tuple[int, int], ...]  # (from, to): the state goes along
    new: tuple[tuple[int, Sequence], ...]  # slots that a sequence takes: all is written anew
    is_padding_stale: bool  # slots from the number of rows on may hold rows that left


class Slots:
    """A sequence keeps its slot as long as each decode step has it; rows fill slots 0 to n - 1.

    Who is missing from a decode step (finished, aborted, preempted, at its end) loses its slot, and
    the last ones move into the holes: a step costs what its number of rows costs.
    """

    def __init__(self) -> None:
        self._seqs: list[Sequence] = []  # by slot
        self._is_padding_stale = True  # whatever a failed step has left

    def slot_of(self, seqs: Rows[Sequence]) -> list[int]:
        """The slots of a step's rows, after `change`."""
        slots = {id(seq): slot for slot, seq in enumerate(self._seqs)}
        return [slots[id(seq)] for seq in seqs]

    def change(self, seqs: Rows[Sequence]) -> SlotChanges:
        """Makes these the rows of the next step."""
        staying = {id(seq) for seq in seqs} & {id(seq) for seq in self._seqs}
        before = len(self._seqs)
        by_slot: list[Sequence | None] = [seq if id(seq) in staying else None for seq in self._seqs]
        new = []
        coming = [seq for seq in seqs if id(seq) not in staying]
        by_slot.extend([None] * (len(seqs) - before))
        holes = [slot for slot, seq in enumerate(by_slot) if seq is None and slot < len(seqs)]
        for slot, seq in zip(holes, coming, strict=False):
            by_slot[slot] = seq
            new.append((slot, seq))
        assert len(new) == len(coming), "as many slots as rows"
        moved = []
        sources = [slot for slot, seq in enumerate(by_slot) if seq is not None]
        for hole in holes[len(coming) :]:
            source = sources.pop()
            moved.append((source, hole))
            by_slot[hole], by_slot[source] = by_slot[source], None
        self._seqs = [seq for seq in by_slot[: len(seqs)] if seq is not None]
        assert len(self._seqs) == len(seqs)
        is_padding_stale = self._is_padding_stale or len(seqs) < before
        self._is_padding_stale = False
        return SlotChanges(tuple(moved), tuple(new), is_padding_stale)
