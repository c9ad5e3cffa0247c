"""A skip profile as a picture: where a model can skip, and what it costs. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from skipllm_core.errors import ConfigError
from skipllm_core.skip.profile import MEASURED_POLICIES, SkipProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_KL = 1e-5  # that is drawn, on a logarithmic axis


def draw_profile(profile: SkipProfile, path: Path) -> None:
    """How much each layer's FFN turns the residual, with the cold regions shaded; and for every
    policy, against the share of FFN weights that it leaves out, how often the model still chooses
    the same token, and the KL."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("it needs matplotlib: pip install 'skipllm[eval]'") from None
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_similarities(left, profile)
    for policy in MEASURED_POLICIES:
        points = profile.points(policy)
        if not points:
            continue
        ratios = [0.0, *(100 * point.skipped_ffn_share for point in points)]
        style = "o-" if policy in ("ffn_skip", "neurons") else "o--"
        width = 2.0 if policy in ("ffn_skip", "neurons") else 1.0
        agreements = [100.0, *(100 * point.top1_agreement for point in points)]
        middle.plot(ratios, agreements, style, ms=3, lw=width, label=policy)
        kls = [max(LEAST_KL, point.kl) for point in points]
        right.plot(ratios[1:], kls, style, ms=3, lw=width, label=policy)
    middle.set(
        xlabel="FFN weights left out, %",
        ylabel="same next token as the full model's, %",
        title="agreement, on held-out answers",
    )
    right.set(
        yscale="log",
        xlim=(0, None),
        xlabel="FFN weights left out, %",
        ylabel="KL(full || skipping), nats per token",
        title="divergence, on held-out answers",
    )
    for axes in (middle, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_similarities(axes: Axes, profile: SkipProfile) -> None:
    layers = range(profile.num_layers)
    curves = profile.similarity
    # 1 - cosine on a logarithmic axis: the plateau lies within a few thousandths of 1.
    floor = 1e-7
    for low, high, alpha in (("p95", "p05", 0.15), ("p75", "p25", 0.3)):
        axes.fill_between(
            layers,
            [max(floor, 1 - getattr(layer, low)) for layer in curves],
            [max(floor, 1 - getattr(layer, high)) for layer in curves],
            color="tab:blue",
            alpha=alpha,
            lw=0,
            label=f"percentiles {int(high[1:])} to {int(low[1:])}",
        )
    axes.plot(layers, [max(floor, 1 - layer.mean) for layer in curves], "o-", ms=3, label="mean")
    for start, end, label in (
        (0, profile.cold_start + 1, "cold regions at 25 %"),
        (profile.cold_end, profile.num_layers, None),
    ):
        axes.axvspan(start - 0.5, end - 0.5, color="grey", alpha=0.25, lw=0, label=label)
    axes.set(
        yscale="log",
        xlim=(-0.5, profile.num_layers - 0.5),
        xlabel="layer",
        ylabel="1 - cos(h, h + FFN(h))",
        title="similarity per layer (higher: skips more easily)",
    )
    axes.invert_yaxis()
    axes.legend(fontsize=8)
