"""report.md, report.csv and report.json of a run."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from skipllm_core.evals import paper
from skipllm_core.evals.summary import HEADLINE, Row, Score

_COLUMNS = (
    "task", "policy", "asked_ratio", "warmup_tokens", "token_skip_ratio", "weight_bytes_ratio",
    "weight_skip_ratio", "tokens_per_s", "score", "mean", "low", "high", "num_items",
)  # fmt: skip


_TERMS = """\
Written by `skipllm eval`. Intervals are of 95 %: Wilson's for shares, by resampling the items
otherwise. `token skip` is skipped FFN blocks / (decoded tokens x layers), as the paper counts.
`weight bytes` is that times the FFN's share of a decoder layer's weights: what a batch of one does
not read. `weight skip` is the share of FFN weight reads that this run's batches avoided. Skips are
counted, not assumed from what was asked for. `tok/s` is over this run's decode steps, on a machine
that may have had other work: no benchmark. `agreement` is the share of items whose every answer is
the full model's to the letter. `repetition`: a run of 4 words or marks stands in an answer 3 times
or more. `collapse`: an answer's last 8 words or marks are the same one."""


def write_report(out: Path, run: dict[str, object], rows: Sequence[Row]) -> None:
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
    (out / "report.md").write_text(markdown(run, rows), "utf-8")


def _facts(row: Row) -> tuple[object, ...]:
    s = row.setting
    ratios = (row.token_skip_ratio, row.weight_bytes_ratio, row.weight_skip_ratio)
    return row.task, s.policy, s.ratio, s.warmup_tokens, *ratios, row.tokens_per_s


def _parts(score: Score) -> tuple[object, ...]:
    return score.mean, score.low, score.high, score.num_items


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return value


def markdown(run: dict[str, object], rows: Sequence[Row]) -> str:
    """The report as people read it."""
    model = str(run["model"])
    parts = [
        f"# Evaluation of {model}",
        _TERMS,
        "Run: `" + json.dumps(run) + "`",
    ]
    plain = [row for row in rows if row.setting.warmup_tokens is None]
    for task in dict.fromkeys(row.task for row in plain):
        of_task = [row for row in plain if row.task == task]
        parts += [f"## {task}", _table(of_task), "By group:", _groups(of_task)]
    if plain:
        parts += ["## Figures", "![accuracy](accuracy.png)", "![throughput](throughput.png)"]
    if any(row.task == "summarization" for row in plain):
        parts.append("![by length of article](groups.png)")
    if near := [row for row in plain if row.setting.ratio in (0.0, 0.2)]:
        parts += ["## At 20 % (the paper's Table 2)", _short(near)]
    if warm := [row for row in rows if row.setting.warmup_tokens is not None]:
        parts.append("## Warm-up tokens (the paper's Figure 5)")
        for task in dict.fromkeys(row.task for row in warm):
            parts += [f"{task}:", _table([row for row in warm if row.task == task])]
        parts.append("![warm-up](warmup.png)")
    if paper.is_paper_model(model):
        parts += ["## The paper's numbers", _paper()]
    else:
        parts.append("The paper's numbers are of Llama-2-7B-chat, and not set beside this model's.")
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    names.sort(key=lambda name: name != HEADLINE[rows[0].task])
    aspects = list(dict.fromkeys(name for row in rows for name in row.ratings))
    head = ["policy", "asked", "warm-up", "token skip", "weight bytes", "weight skip", "tok/s",
            "items", *names, *(f"judge: {a}" for a in aspects)]  # fmt: skip
    lines = []
    for row in rows:
        warmup = row.setting.warmup_tokens
        headline = row.headline
        lines.append(
            [
                row.setting.policy,
                f"{row.setting.ratio:.0%}",
                "profile's" if warmup is None else str(warmup),
                _share(row.token_skip_ratio),
                _share(row.weight_bytes_ratio),
                _share(row.weight_skip_ratio),
                "-" if row.tokens_per_s is None else f"{row.tokens_per_s:.0f}",
                str(headline.num_items) if headline else "-",
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
            + [_share(row.token_skip_ratio if row else None) for row in found]
        )
    return _lines(["policy", "asked", *tasks, *(f"token skip, {t}" for t in tasks)], lines)


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
