"""What a run has found, appended line by line so that an interrupted run goes on where it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec

from skipllm_core.errors import ConfigError


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One point of the grid. `ratio` is what is asked for; `warmup_tokens` None: the profile's."""

    policy: str
    ratio: float
    warmup_tokens: int | None = None


FULL = Setting(policy="never", ratio=0.0)


class Record(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """The answers to one item's turns under one setting."""

    setting: Setting
    task: str
    item_id: str
    answers: tuple[str, ...]
    num_tokens: int  # generated over all answers, each one's first and its stop token included
    skipped_ffn_blocks: float  # whole ones, and parts of others: in blocks' worth of weights
    total_ffn_blocks: int

    @property
    def key(self) -> tuple[Setting, str, str]:
        return self.setting, self.task, self.item_id


def mean_answer_tokens(records: Iterable[Record], task: str) -> int:
    """Tokens of one answer of the full model to this task, on average, rounded up. Early exit falls
    to its last layer over so many tokens: SkipDecode's own way, a budget per data set."""
    found = [record for record in records if (record.setting, record.task) == (FULL, task)]
    assert found, "the full model answers first"
    return math.ceil(sum(r.num_tokens for r in found) / sum(len(r.answers) for r in found))


class Timing(msgspec.Struct, frozen=True, kw_only=True, tag="timing"):
    """The decode steps of one setting and task, in one run; several runs add up."""

    setting: Setting
    task: str
    num_tokens: int
    duration_s: float
    ffn_weight_reads: float
    ffn_weight_reads_avoided: float


class Journal:
    """The file of a run's records. Its first line names the run: another run is refused."""

    def __init__(self, path: Path, run: dict[str, object]) -> None:
        self.records: dict[tuple[Setting, str, str], Record] = {}
        self.timings: list[Timing] = []
        self._path = path
        header = msgspec.json.encode(run)
        if path.exists() and (data := path.read_bytes()):
            # What stands behind the last line feed was cut off by the interruption.
            whole, _, _ = data.rpartition(b"\n")
            first, *lines = whole.split(b"\n")
            if first != header:
                raise ConfigError(f"{path} is of a run with other settings: name another --out")
            for line in lines:
                self._take(msgspec.json.decode(line, type=Record | Timing))
            path.write_bytes(whole + b"\n")
        else:
            path.write_bytes(header + b"\n")

    def append(self, entry: Record | Timing) -> None:
        self._take(entry)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")

    def _take(self, entry: Record | Timing) -> None:
        if isinstance(entry, Record):
            self.records[entry.key] = entry
        else:
            self.timings.append(entry)
