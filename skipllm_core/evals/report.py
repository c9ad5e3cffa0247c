"""report.md, report.csv and report.json of a run."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from skipllm_core.evals import paper, points
from skipllm_core.evals.summary import SLOW_POLICIES, Row, Score, at_weight_bytes, headline_of
from skipllm_core.skip.profile import SkipProfile

_COLUMNS = (
    "task", "policy", "asked_ratio", "warmup_tokens", "skipped_ffn_share", "weight_bytes_ratio",
    "weight_skip_ratio", "tokens_per_s", "score", "mean", "low", "high", "num_items",
)  # fmt: skip


_TERMS = """\
Written by `skipllm eval`. Intervals are of 95 %: Wilson's for shares, by resampling the items
otherwise. `FFN share` is the share of FFN weights not used over decoded tokens x layers: of blocks
it is the paper's skip ratio, of neurons their rows of up and down. `weight bytes` is the share of
the decoder layers' weights that a batch of one does not read: FFN share times the share that a skip
saves of its layer, which is the FFN's, under layer_drop the whole, and under early_exit the FFN's
and those of q and o (k and v are still computed, for the cache).
`weight skip` is the share of FFN weight reads that this run's batches avoided. Skips are counted,
not assumed from what was asked for. `tok/s` is over this run's decode steps, on a machine that may
have had other work: no benchmark. The default warm-up is the run's `warmup_tokens`, else the
profile's; choices are scored with none. layer_drop and early_exit run on a slow path made for
evaluation alone, so that no tok/s is told for them. `fact`: the last answer is the expected one or,
of the embedded model's `stories`, a coherent one as asked for. `contains`: an accepted answer
stands in the text. `rougeL_full`: against the full model's answers. `agreement` is the share of
items whose every answer is the full model's to the letter. `repetition`: a run of 4 words or marks
stands in an answer 3 times or more. `collapse`: an answer's last 8 words or marks are the same
one."""

_EQUAL_BYTES = """\
The headline score of each policy, in %, at the weight bytes of ffn_skip with 25 % asked for. It is
interpolated linearly between the two settings measured around it, the full model (0) among them;
`-` stands where that is beyond the policy's largest."""


_POINTS = """\
What calibration measured on held-out answers of the full model, read by both: how often the
likeliest next token is the full model's, and KL(full || skipping) in nats per token. By the share
of FFN weights not used that was asked for."""


def write_report(
    out: Path, run: dict[str, object], rows: Sequence[Row], profile: SkipProfile | None = None
) -> None:
    """Writes the three files into `out`, which exists."""
    data = [{**asdict(row), "setting": msgspec.structs.asdict(row.setting)} for row in rows]
    text = json.dumps({"run": run, "rows": [_rounded(one) for one in data]}, indent=1)
    (out / "report.json").write_text(text + "\n", "utf-8")
    with (out / "report.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for row in rows:
            for name, score in {**row.scores, **row.ratings}.items():
                writer.writerow([_rounded(value) for value in (*_facts(row), name, *_parts(score))])
    (out / "report.md").write_text(markdown(run, rows, profile), "utf-8")


def _facts(row: Row) -> tuple[object, ...]:
    s = row.setting
    ratios = (row.skipped_ffn_share, row.weight_bytes_ratio, row.weight_skip_ratio)
    return row.task, s.policy, s.ratio, s.warmup_tokens, *ratios, row.tokens_per_s


def _parts(score: Score) -> tuple[object, ...]:
    return score.mean, score.low, score.high, score.num_items


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return value


def markdown(
    run: dict[str, object], rows: Sequence[Row], profile: SkipProfile | None = None
) -> str:
    """The report as people read it."""
    model = str(run["model"])
    parts = [f"# Evaluation of {model}", _TERMS, "Run: `" + json.dumps(run) + "`"]
    parts += [] if profile is None else _profile_parts(profile)
    plain = [row for row in rows if row.setting.warmup_tokens is None]
    for task in dict.fromkeys(row.task for row in plain):
        of_task = [row for row in plain if row.task == task]
        parts += [f"## {task}", _table(of_task)]
        if budgets := {row.budget_tokens for row in of_task} - {None}:
            parts.append(
                f"early_exit reaches its last layer at {budgets.pop()} generated tokens: the mean "
                "length of the full model's answers to this task."
            )
        if len(of_task[0].groups) > 1:
            parts += ["By group:", _groups(of_task)]
    if plain:
        parts += ["## Figures", "![accuracy](accuracy.png)", "![throughput](throughput.png)"]
    if any(row.task == "summarization" and len(row.groups) > 1 for row in plain):
        parts.append("![summaries by group](groups.png)")
    if near := [row for row in plain if row.setting.ratio in (0.0, 0.2)]:
        parts += ["## At 20 % (the paper's Table 2)", _short(near)]
    if table := _equal_bytes(plain):
        parts += ["## At equal weight bytes", _EQUAL_BYTES, table]
    parts += _warmup_parts([row for row in rows if row.setting.warmup_tokens is not None])
    if paper.is_paper_model(model):
        parts += ["## The paper's numbers", _paper()]
    else:
        parts.append("The paper's numbers are of Llama-2-7B-chat, and not set beside this model's.")
    return "\n\n".join(parts) + "\n"


def _warmup_parts(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    of = rows[0].setting
    parts = [f"## Warm-up tokens (the paper's Figure 5): {of.policy} at {of.ratio:.0%}"]
    for task in dict.fromkeys(row.task for row in rows):
        parts += [f"{task}:", _table([row for row in rows if row.task == task])]
    return [*parts, "![warm-up](warmup.png)"]


def _profile_parts(profile: SkipProfile) -> list[str]:
    return [
        "## The skip profile",
        _POINTS,
        _lines(*points.by_share(profile)),
        "The largest such share at an agreement, between the points linearly:",
        _lines(*points.by_agreement(profile)),
        "![by policy](points.png)",
    ]


def _table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    first = headline_of(rows[0].task, names)
    names.sort(key=lambda name: name != first)
    aspects = list(dict.fromkeys(name for row in rows for name in row.ratings))
    head = ["policy", "asked", "warm-up", "FFN share", "weight bytes", "weight skip", "tok/s",
            "items", *names, *(f"judge: {a}" for a in aspects)]  # fmt: skip
    lines = []
    for row in rows:
        warmup = row.setting.warmup_tokens
        has_warmup = (
            row.setting.policy not in ("never", *SLOW_POLICIES) and row.task != "multiple_choice"
        )
        lines.append(
            [
                row.setting.policy,
                f"{row.setting.ratio:.0%}",
                "-" if not has_warmup else "default" if warmup is None else str(warmup),
                _share(row.skipped_ffn_share),
                _share(row.weight_bytes_ratio),
                _share(row.weight_skip_ratio),
                "-" if row.tokens_per_s is None else f"{row.tokens_per_s:.0f}",
                str(row.headline.num_items),
                *(_with_interval(row.scores.get(name), 100) for name in names),
                *(_with_interval(row.ratings.get(name), 1) for name in aspects),
            ]
        )
    return _lines(head, lines)


def _groups(rows: Sequence[Row]) -> str:
    groups = list(dict.fromkeys(group for row in rows for group in row.groups))
    return _lines(
        ["policy", "asked", *groups],
        [
            [
                row.setting.policy,
                f"{row.setting.ratio:.0%}",
                *(_with_interval(row.groups.get(g), 100) for g in groups),
            ]
            for row in rows
        ],
    )


def _short(rows: Sequence[Row]) -> str:
    tasks = list(dict.fromkeys(row.task for row in rows))
    of = {(row.setting, row.task): row for row in rows}
    lines = []
    for setting in dict.fromkeys(row.setting for row in rows):
        found = [of.get((setting, task)) for task in tasks]
        lines.append(
            [setting.policy, f"{setting.ratio:.0%}"]
            + [_with_interval(row.headline if row else None, 100) for row in found]
            + [
                f"{_share(row.skipped_ffn_share)} / {_share(row.weight_bytes_ratio)}"
                if row
                else "-"
                for row in found
            ]
        )
    ratios = (f"FFN share / weight bytes, {task}" for task in tasks)
    return _lines(["policy", "asked", *tasks, *ratios], lines)


def _equal_bytes(rows: Sequence[Row]) -> str:
    """Empty where ffn_skip was not measured at 25 %, or the model's shape is not known."""
    at = {
        row.task: row.weight_bytes_ratio
        for row in rows
        if (row.setting.policy, row.setting.ratio) == ("ffn_skip", 0.25)
        and row.weight_bytes_ratio is not None
    }
    if not at:
        return ""
    full = {row.task: row.headline for row in rows if row.setting.policy == "never"}
    lines = [
        ["weight bytes", *map(_share, at.values())],
        ["never, at 0", *(_with_interval(full.get(task), 100) for task in at)],
    ]
    for policy in dict.fromkeys(row.setting.policy for row in rows):
        if policy == "never":
            continue
        of_policy = [row for row in rows if row.setting.policy in ("never", policy)]
        scores = [
            at_weight_bytes([row for row in of_policy if row.task == task], ratio)
            for task, ratio in at.items()
        ]
        lines.append([policy, *("-" if s is None else f"{100 * s:.1f}" for s in scores)])
    return _lines(["policy", *at], lines)


def _paper() -> str:
    ratios = (0.05, 0.15, 0.25, 0.35)
    tables = [
        _lines(
            ["at about 20 %", "Factoid-QA, %", "MT-Bench", "summaries"],
            [[name, *map(str, scores)] for name, scores in paper.AT_20.items()],
        ),
        _lines(
            ["Factoid-QA, %", *(f"{r:.0%}" for r in ratios)],
            [[name, *(str(of[r]) for r in ratios)] for name, of in paper.FACTOID.items()],
        ),
        _lines(
            ["throughput, RTX A6000", *(f"{r:.0%}" for r in paper.SPEED)],
            [["over no skipping", *(f"{x}x" for x in paper.SPEED.values())]],
        ),
    ]
    return "\n\n".join(tables)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_interval(score: Score | None, scale: int) -> str:
    if score is None:
        return "-"
    return f"{score.mean * scale:.1f} ({score.low * scale:.1f} to {score.high * scale:.1f})"


def _lines(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)
    )
