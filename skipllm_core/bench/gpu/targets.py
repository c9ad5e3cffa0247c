"""What `skipllm bench gpu` was to reach, and whether it did: Llama-2-7B on one H200."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from skipllm_core.bench.gpu.measurement import GpuMeasurement, GpuPolicy
from skipllm_core.bench.gpu.steps import Fit

SHAPE, CONTEXT, NUM_LAYERS = "llama-2-7b", 512, 32


def targets(rows: Sequence[GpuMeasurement]) -> Iterator[str]:
    """A line per target whose numbers were measured."""
    rows = [row for row in rows if row.model == SHAPE and row.context == CONTEXT]
    full = [row for row in rows if row.batch == 1 and row.quantization == "none"]
    never = _ms(full, "never")
    if never is not None:
        yield _line("no skip", f"{never:.2f} ms", "at most 3.65 ms", never <= 3.65)
        yield from _speedups(full, never)
        if (gate := _ms(full, "gate only")) is not None:
            cost = gate / never - 1
            yield _line("the gate, nothing skipped", f"{cost:+.1%}", "at most +2 %", cost <= 0.02)
        if (eager := _ms(full, "transformers eager")) is not None:
            times = eager / never
            yield _line("over transformers eager", f"{times:.1f}x", "at least 8x", times >= 8)
    int8 = _ms([row for row in rows if row.batch == 1 and row.quantization == "int8"], "never")
    if int8 is not None:
        yield _line("no skip, W8A16", f"{int8:.2f} ms", "at most 2.2 ms", int8 <= 2.2)
    for row in rows:
        is_wanted = row.policy == "mixed" and row.batch == 8 and row.quantization == "none"
        if is_wanted and row.saved_ms is not None and row.expected_saved_ms:
            off = row.saved_ms / row.expected_saved_ms - 1
            what = "batch 8, saved against E[blocks saved]"
            yield _line(what, f"{off:+.1%}", "within 10 %", abs(off) <= 0.1)


def _speedups(full: Sequence[GpuMeasurement], never: float) -> Iterator[str]:
    forced = [row for row in full if row.policy == "forced"]
    skipped = [row.skipped_blocks or 0.0 for row in forced]
    if len(set(skipped)) < 2:
        return
    fit = Fit.of(skipped, [row.ms_per_step for row in forced])
    for share, least in ((0.25, 1.15), (0.30, 1.18)):
        speedup = never / (fit.full_ms - share * NUM_LAYERS * fit.block_ms)
        what = f"{share:.0%} of the blocks skipped, by the fit"
        yield _line(what, f"{speedup:.3f}x", f"at least {least}x", speedup >= least)


def _ms(rows: Sequence[GpuMeasurement], policy: GpuPolicy) -> float | None:
    return next((row.ms_per_step for row in rows if row.policy == policy), None)


def _line(what: str, found: str, wanted: str, is_met: bool) -> str:
    return f"{what}: {found} ({wanted}): {'met' if is_met else 'NOT met'}"
