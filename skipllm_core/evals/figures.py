"""The report's figures. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skipllm_core.errors import ConfigError
from skipllm_core.evals import paper
from skipllm_core.evals.points import measured_policies
from skipllm_core.evals.summary import Row, headline_of
from skipllm_core.skip.profile import SkipProfile

_SKIPPED = "FFN weights not used, %"
_BYTES = "skipped weight bytes of the decoder layers, %"
_LABELS = {
    "exact": "exact match, %",
    "contains": "answer named, %",
    "fact": "last answer right, %",
    "rougeL": "ROUGE-L, %",
    "rougeL_full": "ROUGE-L against the full model's, %",
    "agreement": "same as the full model's, %",
}


def draw(out: Path, model: str, rows: Sequence[Row]) -> None:
    """Writes accuracy.png, throughput.png, groups.png and warmup.png, each where it has rows."""
    plain = [row for row in rows if row.setting.warmup_tokens is None]
    tasks = list(dict.fromkeys(row.task for row in plain))
    if tasks:
        _draw_accuracy(out / "accuracy.png", plain, tasks, paper.is_paper_model(model))
        _draw_throughput(out / "throughput.png", plain, tasks)
    summaries = [row for row in plain if row.task == "summarization"]
    if summaries and len(summaries[0].groups) > 1:
        _draw_groups(out / "groups.png", summaries)
    if warm := [row for row in rows if row.setting.warmup_tokens is not None]:
        _draw_warmups(out / "warmup.png", warm)


def draw_points(path: Path, model: str, profile: SkipProfile) -> None:
    """Agreement and KL of every policy that the profile measured, against FFN weights not used."""
    figure, (agreement, kl) = _panels(2)
    for policy, points in measured_policies(profile).items():
        x = [100 * point.skipped_ffn_share for point in points]
        top1 = [100 * point.top1_agreement for point in points]
        agreement.plot([0, *x], [100, *top1], "o-", label=policy)
        kl.plot(x, [point.kl for point in points], "o-", label=policy)
    kl.set_yscale("log")
    _finish(agreement, model, _SKIPPED, "top-1 agreement with the full model, %")
    _finish(kl, model, _SKIPPED, "KL from the full model, nats per token")
    figure.savefig(path, dpi=120)


def _label(rows: Sequence[Row]) -> str:
    """What the headline score of these rows, of one task, is."""
    return _LABELS[headline_of(rows[0].task, rows[0].scores)]


def _panels(num: int, *, num_rows: int = 1, share_y: bool = False) -> tuple[Any, Any]:
    """The figure, and its axes in one flat row of num_rows * num."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures need matplotlib: pip install 'skipllm[eval]'") from None
    figure = Figure(figsize=(4.6 * num, 3.8 * num_rows), layout="constrained")
    return figure, figure.subplots(num_rows, num, squeeze=False, sharey=share_y).flat


def _finish(axis: Any, title: str, x: str, y: str) -> None:
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _draw_accuracy(path: Path, rows: Sequence[Row], tasks: Sequence[str], is_paper: bool) -> None:
    """By FFN weights not used and, below, by weight bytes where they are known: there policies that
    leave out more than FFN weights compare."""
    measures = [_ffn_share]
    if any(row.weight_bytes_ratio is not None for row in rows):
        measures.append(_weight_bytes)
    figure, axes = _panels(len(tasks), num_rows=len(measures))
    panels = [(measure, task) for measure in measures for task in tasks]
    for axis, (measure, task) in zip(axes, panels, strict=True):
        of_task = [row for row in rows if row.task == task]
        for policy, line in _by_policy(of_task).items():
            _curve(axis, line, [row.headline for row in line], policy, measure)
        if is_paper and task == "factoid_qa" and measure is _ffn_share:
            for name, points in paper.FACTOID.items():
                x = [100 * ratio for ratio in points]
                axis.plot(x, list(points.values()), "k:", lw=1, label=f"{name}, paper")
        _finish(axis, task, _SKIPPED if measure is _ffn_share else _BYTES, _label(of_task))
    figure.savefig(path, dpi=120)


def _draw_throughput(path: Path, rows: Sequence[Row], tasks: Sequence[str]) -> None:
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        timed = [row for row in rows if row.task == task and row.tokens_per_s]
        for policy, line in _by_policy(timed).items():
            x = [100 * row.skipped_ffn_share for row in line]
            axis.plot(x, [row.tokens_per_s for row in line], "o-", label=policy)
        _finish(axis, task, _SKIPPED, "decode throughput, tokens / s")
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def _draw_groups(path: Path, rows: Sequence[Row]) -> None:
    groups = list(rows[0].groups)
    figure, axes = _panels(len(groups), share_y=True)
    for axis, group in zip(axes, groups, strict=True):
        for policy, line in _by_policy(rows).items():
            _curve(axis, line, [row.groups[group] for row in line], policy)
        _finish(axis, f"articles: {group}", "FFN weights not used over all groups, %", _label(rows))
    figure.savefig(path, dpi=120)


def _draw_warmups(path: Path, rows: Sequence[Row]) -> None:
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        line = sorted(
            (row for row in rows if row.task == task),
            key=lambda row: row.setting.warmup_tokens or 0,
        )
        x = [row.setting.warmup_tokens for row in line]
        y = [100 * row.headline.mean for row in line]
        axis.plot(x, y, "o-", label=_label(line))
        skipped = [100 * row.skipped_ffn_share for row in line]
        axis.plot(x, skipped, "s--", color="grey", label=_SKIPPED)
        title = f"{task}, {line[0].setting.policy} at {line[0].setting.ratio:.0%} asked"
        _finish(axis, title, "warm-up tokens, decoded in full", "%")
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def _by_policy(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Each policy's rows from the full model on, by what they skipped."""
    full = [row for row in rows if row.setting.policy == "never"]
    policies = [p for p in dict.fromkeys(row.setting.policy for row in rows) if p != "never"]
    return {
        policy: sorted(
            full + [row for row in rows if row.setting.policy == policy],
            key=lambda row: row.skipped_ffn_share,
        )
        for policy in policies
    } or {"never": full}


def _ffn_share(row: Row) -> float:
    return row.skipped_ffn_share


def _weight_bytes(row: Row) -> float:
    assert row.weight_bytes_ratio is not None, "one run knows the model's shape or does not"
    return row.weight_bytes_ratio


def _curve(
    axis: Any,
    rows: Sequence[Row],
    scores: Sequence[Any],
    label: str,
    measure: Callable[[Row], float] = _ffn_share,
) -> None:
    means = [100 * score.mean for score in scores]
    below = [mean - 100 * score.low for mean, score in zip(means, scores, strict=True)]
    above = [100 * score.high - mean for mean, score in zip(means, scores, strict=True)]
    axis.errorbar(
        [100 * measure(row) for row in rows],
        means,
        yerr=[[max(0.0, b) for b in below], [max(0.0, a) for a in above]],
        fmt="o-",
        capsize=3,
        label=label,
    )
