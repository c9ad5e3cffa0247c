"""`skipllm bench gpu --plot`: a row of two pictures for each shape, weights and context.

left   step time against the FFN blocks that every row skips, with the fit T = a - k b
right  speed-up over `never` against the token skip ratio, rows that differ included
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from skipllm_core.bench.gpu.measurement import GpuMeasurement
from skipllm_core.bench.gpu.steps import Fit
from skipllm_core.bench.plot import colors, dress, dress_speedups

_MARKS = {
    "forced": ("o", "every row skips the same"),
    "ffn_skip": ("^", "by the rows' own similarities"),
    "mixed": ("s", "rows trigger by chance"),
    "neurons": ("v", "each row leaves out its neurons"),
    "neurons together": ("P", "rows leave out neurons together"),
    "gate only": ("D", "the gate alone, nobody skips"),
}


def plot_steps(rows: Sequence[GpuMeasurement], path: Path, *, device_name: str) -> None:
    """Writes a PNG; a colour is a batch, in all pictures the same one."""
    rows = [row for row in rows if not row.policy.startswith("transformers")]
    cases = list(dict.fromkeys((row.model, row.weights, row.context) for row in rows))
    batches = sorted({row.batch for row in rows})
    color_of = dict(zip(batches, colors(), strict=False))
    figure = Figure(figsize=(11, 4.2 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Decode steps on {device_name}, random weights", fontweight="bold")
    axes = figure.subplots(len(cases), 2, squeeze=False)
    for (model, weights, context), (left, right) in zip(cases, axes, strict=True):
        case = (model, weights, context)
        for batch in batches:
            found = [
                row
                for row in rows
                if (row.model, row.weights, row.context) == case and row.batch == batch
            ]
            if found:
                _draw_times(left, found, color_of[batch])
                _draw_speedups(right, found, color_of[batch])
        left.set_title(f"{model}, {weights}, context {context}", loc="left")
        left.set_ylim(bottom=0)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        dress(left, "FFN blocks skipped by every row, k", "step, ms")
        left.legend(frameon=False, fontsize="small", loc="lower left")
        dress_speedups(right)
        _explain_marks(right)
    figure.savefig(path, dpi=150, format="png")


def _draw_times(axes: Axes, found: Sequence[GpuMeasurement], color: str) -> None:
    forced = [row for row in found if row.policy == "forced"]
    skipped = [row.skipped_blocks or 0.0 for row in forced]
    label = f"batch {found[0].batch}"
    if len(set(skipped)) > 1:
        fit = Fit.of(skipped, [row.ms_per_step for row in forced])
        ends = [min(skipped), max(skipped)]
        times = [fit.full_ms - fit.block_ms * end for end in ends]
        axes.plot(ends, times, color=color, linewidth=1.2)
        label += f": {fit.full_ms:.3f} ms - {fit.block_ms * 1e3:.1f} us k"
    axes.plot(
        skipped,
        [row.ms_per_step for row in forced],
        color=color,
        marker="o",
        linestyle="none",
        label=label,
    )


def _draw_speedups(axes: Axes, found: Sequence[GpuMeasurement], color: str) -> None:
    for policy, (marker, _) in _MARKS.items():
        points = sorted(
            (100 * row.token_skip_ratio, row.speedup_vs_never)
            for row in found
            if row.policy == policy
            and row.token_skip_ratio is not None
            and row.speedup_vs_never is not None
        )
        if points:
            axes.plot(
                [ratio for ratio, _ in points],
                [speedup for _, speedup in points],
                color=color,
                marker=marker,
                markerfacecolor=color if policy == "forced" else "white",
                linestyle="-" if policy == "forced" else "none",
            )


def _explain_marks(axes: Axes) -> None:
    for policy, (marker, name) in _MARKS.items():
        face = "0.4" if policy == "forced" else "white"
        axes.plot([], [], marker, color="0.4", markerfacecolor=face, label=name)
    axes.legend(frameon=False, fontsize="small", loc="upper left")
