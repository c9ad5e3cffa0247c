"""What a case's timed steps come to. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from skipllm_core.bench.cases import Case
from skipllm_core.bench.roofline import StepBytes
from skipllm_core.engine.runner import StepResult
from skipllm_core.types import ROWS_PER_NEURON, num_rows_left_out


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeMeasurement:
    """One case; times are medians over the steps of all rounds.

    Ratios that have no meaning for a case are None: those to transformers where it did not run,
    the gate's cost where something was skipped, the skip ratios of transformers.
    """

    engine: str
    policy: str
    label: str
    forced_skip: int | None  # of `num_layers` FFN blocks, by every row
    skip_ratio_asked: float | None
    batch: int
    context: int  # tokens in the cache before the first step; a step adds one
    steps: int
    rounds: int
    samples: int  # steps that were timed
    ms_per_step: float
    ms_per_step_p10: float
    ms_per_step_p90: float
    tokens_per_s: float
    bytes_per_step: float
    ceiling_share: float  # of the read bandwidth
    skipped_ffn_share: float
    token_skip_ratio: float
    weight_skip_ratio: float
    speedup_vs_never: float
    ideal_speedup: float | None
    share_of_ideal: float | None
    gate_cost: float | None  # time over never's, less 1, where the gate watched and skipped nothing
    speedup_vs_transformers: float | None
    tokens_equal_transformers: float | None  # share of equal greedy tokens; policy never


@dataclass(slots=True)
class Tally:
    """What a case's turns have given so far."""

    step_s: list[float] = field(default_factory=list)
    num_rows: int = 0  # decoded tokens
    num_skipped: int = 0  # FFN blocks, over all rows
    num_left_out: int = 0  # rows of FFN weights, of blocks that were not skipped
    num_steps: int = 0
    num_avoided: float = 0.0  # layers' worth whose FFN weights no row needed, over all steps
    tokens: list[list[int]] = field(default_factory=list)  # per row, of the last turn

    def count(self, result: StepResult, step_s: float) -> None:
        self.step_s.append(step_s)
        self.num_steps += 1
        self.num_rows += len(result.rows)
        self.num_skipped += sum(len(row.skipped_layers) for row in result.rows)
        self.num_left_out += sum(num_rows_left_out(row.neurons) for row in result.rows)
        self.num_avoided += result.ffn_weight_reads_avoided


def measurement(
    case: Case,
    cases: Sequence[Case],
    tallies: Mapping[Case, Tally],
    step_bytes: StepBytes,
    *,
    num_layers: int,
    num_neurons: int,
    context: int,
    steps: int,
    rounds: int,
    read_bytes_per_s: float,
) -> DecodeMeasurement:
    """Of one of the cases, beside `never` and transformers at its batch size."""
    tally = tallies[case]
    mates = [other for other in cases if other.batch == case.batch]
    never = next(mate for mate in mates if mate.engine == "skipllm" and mate.policy == "never")
    theirs = next((mate for mate in mates if mate.engine == "transformers"), None)
    step_s, never_s = median(tally.step_s), median(tallies[never].step_s)
    is_ours = case.engine == "skipllm"
    num_avoided = tally.num_avoided / max(1, tally.num_steps)
    speedup, ideal = never_s / step_s, step_bytes.ideal_speedup(num_avoided)
    num_blocks = max(1, tally.num_rows * num_layers)
    left_out = tally.num_skipped + tally.num_left_out / (ROWS_PER_NEURON * num_neurons)
    watches_only = case.policy == "ffn_skip" and not tally.num_skipped
    return DecodeMeasurement(
        engine=case.engine,
        policy=case.policy,
        label=case.label,
        forced_skip=case.forced_skips[0] if case.policy == "forced" else None,
        skip_ratio_asked=case.skip_ratio,
        batch=case.batch,
        context=context,
        steps=steps,
        rounds=rounds,
        samples=len(tally.step_s),
        ms_per_step=step_s * 1e3,
        ms_per_step_p10=percentile(tally.step_s, 0.1) * 1e3,
        ms_per_step_p90=percentile(tally.step_s, 0.9) * 1e3,
        tokens_per_s=case.batch / step_s,
        bytes_per_step=step_bytes.read(num_avoided),
        ceiling_share=step_bytes.read(num_avoided) / read_bytes_per_s / step_s,
        skipped_ffn_share=left_out / num_blocks,
        token_skip_ratio=tally.num_skipped / num_blocks,
        weight_skip_ratio=num_avoided / num_layers,
        speedup_vs_never=speedup,
        ideal_speedup=ideal if is_ours else None,
        share_of_ideal=speedup / ideal if is_ours else None,
        gate_cost=step_s / never_s - 1 if watches_only else None,
        speedup_vs_transformers=(
            None if theirs is None else median(tallies[theirs].step_s) / step_s
        ),
        tokens_equal_transformers=(
            equal_share(tally.tokens, tallies[theirs].tokens)
            if theirs is not None and case is never
            else None
        ),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def equal_share(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> float:
    pairs = [
        pair
        for row, their_row in zip(ours, theirs, strict=True)
        for pair in zip(row, their_row, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)
