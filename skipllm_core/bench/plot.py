"""Speed-up against the skip ratio, beside what the bytes saved would give at best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from skipllm_core.bench.measurement import DecodeMeasurement

# Okabe and Ito's colours: told apart by colour-blind readers too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_speedups(
    measurements: Sequence[DecodeMeasurement], path: Path, *, title: str, subtitle: str
) -> None:
    """Writes a PNG: a line per batch through its forced masks, its ideal as a dashed one, and the
    adaptive and the mixed cases as marks of their own."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ours = [found for found in measurements if found.engine == "skipllm"]
    for batch, color in zip(dict.fromkeys(found.batch for found in ours), colors(), strict=False):
        of_batch = [found for found in ours if found.batch == batch]
        line = sorted(
            (found for found in of_batch if found.policy in ("never", "forced")),
            key=lambda found: found.skipped_ffn_share,
        )
        ratios = [100 * found.skipped_ffn_share for found in line]
        axes.plot(
            ratios,
            [found.ideal_speedup or 1.0 for found in line],
            color=color,
            linestyle="--",
            linewidth=1.2,
            alpha=0.8,
            label=f"batch {batch}, ideal by bytes read",
        )
        axes.plot(
            ratios,
            [found.speedup_vs_never for found in line],
            color=color,
            marker="o",
            label=f"batch {batch}, measured",
        )
        for policy, marker, name in (
            ("ffn_skip", "D", "adaptive"),
            ("neurons", "^", "neurons"),
            ("mixed", "s", "rows differ"),
        ):
            points = [found for found in of_batch if found.policy == policy]
            if points:
                axes.plot(
                    [100 * found.skipped_ffn_share for found in points],
                    [found.speedup_vs_never for found in points],
                    color=color,
                    marker=marker,
                    markerfacecolor="white",
                    linestyle="none",
                    label=f"batch {batch}, {name}",
                )
    dress_speedups(axes)
    axes.legend(frameon=False, fontsize="small", loc="upper left")
    axes.set_title(title, loc="left", fontweight="bold", pad=24)
    axes.annotate(
        subtitle,
        (0, 1),
        (0, 8),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize="small",
        color="0.35",
    )
    figure.savefig(path, dpi=150, format="png")


def dress_speedups(axes: Axes) -> None:
    axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    dress(axes, "FFN weights left out (%)", "speed-up over computing all of them")


def dress(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def colors() -> list[str]:
    return list(_COLORS) * 16
