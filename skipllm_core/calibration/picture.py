"""A skip profile as a picture: where a model can skip, and what it costs. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from skipllm_core.errors import ConfigError
from skipllm_core.skip.profile import SkipProfile


def draw_profile(profile: SkipProfile, path: Path) -> None:
    """Left: how much each layer's FFN turns the residual, with the cold regions shaded. Right: how
    often the model still chooses the same token, against the ratio, and the KL."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("it needs matplotlib: pip install 'skipllm[eval]'") from None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)

    layers = range(profile.num_layers)
    curves = profile.similarity
    # 1 - cosine on a logarithmic axis: the plateau lies within a few thousandths of 1.
    floor = 1e-7
    for low, high, alpha in (("p95", "p05", 0.15), ("p75", "p25", 0.3)):
        left.fill_between(
            layers,
            [max(floor, 1 - getattr(layer, low)) for layer in curves],
            [max(floor, 1 - getattr(layer, high)) for layer in curves],
            color="tab:blue",
            alpha=alpha,
            lw=0,
            label=f"percentiles {int(high[1:])} to {int(low[1:])}",
        )
    left.plot(layers, [max(floor, 1 - layer.mean) for layer in curves], "o-", ms=3, label="mean")
    for start, end, label in (
        (0, profile.cold_start + 1, "cold regions at 25 %"),
        (profile.cold_end, profile.num_layers, None),
    ):
        left.axvspan(start - 0.5, end - 0.5, color="grey", alpha=0.25, lw=0, label=label)
    left.set(
        yscale="log",
        xlim=(-0.5, profile.num_layers - 0.5),
        xlabel="layer",
        ylabel="1 - cos(h, h + FFN(h))",
        title="similarity per layer (higher: skips more easily)",
    )
    left.invert_yaxis()
    left.legend(fontsize=8)

    ratios = [100 * point.skipped_ffn_share for point in profile.ffn_skip]
    agreements = [100 * point.top1_agreement for point in profile.ffn_skip]
    (agreement,) = right.plot(ratios, agreements, "o-", label="top-1 agreement")
    right.set(
        xlabel="skipped FFN blocks, %",
        ylabel="same next token as the full model's, %",
        title="quality against ratio, on held-out prompts",
    )
    right.grid(alpha=0.3)
    other = right.twinx()
    kls = [point.kl for point in profile.ffn_skip]
    (kl,) = other.plot(ratios, kls, "s--", color="tab:red", label="KL(full || skipping)")
    other.set(ylabel="nats per token", ylim=(0, None))
    right.legend(handles=[agreement, kl], fontsize=8, loc="center left")
    figure.savefig(path, dpi=120)
