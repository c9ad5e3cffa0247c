"""From answers to the rows of the report. Nothing here asks a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from skipllm_core.demo.data import stories
from skipllm_core.evals.records import FULL, Record, Setting, Timing, mean_answer_tokens
from skipllm_core.evals.scoring import (
    bootstrap,
    contains_answer,
    exact_match,
    is_collapsed,
    is_repetitive,
    rouge,
    wilson,
)
from skipllm_core.evals.tasks import Item
from skipllm_core.model.config import ModelConfig

# The score that stands for a task in the tables and figures: the first of these that it has. Chat
# models wrap names into sentences; what has no right answers is held against the full model's.
HEADLINES = {
    "factoid_qa": ("contains", "exact"),
    "multi_turn": ("fact", "rougeL_full"),
    "summarization": ("rougeL", "rougeL_full"),
    "multiple_choice": ("exact",),
}
# Yes or no for each item; the others are means.
_SHARES = ("exact", "contains", "fact", "agreement", "repetition", "collapse")
# Computed layer by layer for evaluation alone: their speed says nothing.
SLOW_POLICIES = ("layer_drop", "early_exit")
_rouge = lru_cache(maxsize=100_000)(rouge)


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over items, with its 95 % interval."""

    mean: float
    low: float
    high: float
    num_items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting on one task. Ratios are measured; `setting.ratio` is what was asked for."""

    setting: Setting
    task: str
    scores: Mapping[str, Score]
    groups: Mapping[str, Score]  # the headline score, by category or length
    skipped_ffn_share: float  # FFN weights not used, over decoded tokens x layers
    weight_bytes_ratio: float | None  # None: the model's shape is not known (over HTTP)
    weight_skip_ratio: float | None  # None: not told
    tokens_per_s: float | None  # None: of a slow policy, or no decode step was timed
    budget_tokens: int | None = None  # early_exit's
    ratings: Mapping[str, Score] = field(default_factory=dict)

    @property
    def headline(self) -> Score:
        return self.scores[headline_of(self.task, self.scores)]


def headline_of(task: str, names: Collection[str]) -> str:
    """The name of the score, among those that were found, that stands for the task."""
    return next(name for name in (*HEADLINES[task], "agreement") if name in names)


def skipped_share(config: ModelConfig, policy: str) -> float:
    """What a skip leaves unread / all weights of a decoder layer, norms and biases aside.

    With h = hidden_size, a layer has 3 * h * intermediate_size (FFN) + 2 * h * head_dim * num_heads
    (q and o) + 2 * h * head_dim * num_kv_heads (k and v). Left unread are the FFN (Llama-2-7B:
    0.67); under `layer_drop` all of it; under `early_exit` the FFN, q and o (0.83), for k and v are
    applied to the exit's hidden state in every layer left out.
    """
    ffn = 3 * config.hidden_size * config.intermediate_size
    q_and_o = 2 * config.hidden_size * config.head_dim * config.num_heads
    k_and_v = 2 * config.hidden_size * config.head_dim * config.num_kv_heads
    layer = ffn + q_and_o + k_and_v
    match policy:
        case "layer_drop":
            return 1.0
        case "early_exit":
            return (ffn + q_and_o) / layer
        case _:
            return ffn / layer


def at_weight_bytes(rows: Sequence[Row], ratio: float) -> float | None:
    """The headline score that rows of one policy and task, the full model's included, have at this
    weight bytes ratio: linear between the two measured around it, None outside the measured."""
    points = sorted(
        (row.weight_bytes_ratio, row.headline.mean)
        for row in rows
        if row.weight_bytes_ratio is not None
    )
    for (low, low_score), (high, high_score) in pairwise(points):
        if low <= ratio <= high:
            part = (ratio - low) / (high - low) if high > low else 0.0
            return low_score + part * (high_score - low_score)
    return None


def item_scores(item: Item, answers: Sequence[str], full: Sequence[str]) -> dict[str, float]:
    """Every score of one conversation; `full` are the full model's answers to it."""
    last = answers[-1]
    agreement = float(tuple(answers) == tuple(full))
    if item.choices:
        return {"exact": float(exact_match(last, item.accepted)), "agreement": agreement}
    scores: dict[str, float] = {
        "agreement": agreement,
        "repetition": float(any(is_repetitive(a) for a in answers)),
        "collapse": float(any(is_collapsed(a) for a in answers)),
    }
    if item.task == "factoid_qa":
        scores["exact"] = float(exact_match(last, item.accepted))
        if item.is_short_answer:
            scores["contains"] = float(contains_answer(last, item.accepted))
    elif item.task == "multi_turn":
        if item.is_story:
            scores["fact"] = float(stories.is_coherent(last, item.turns[-1]))
        elif item.accepted:
            scores["fact"] = float(exact_match(last, item.accepted))
    elif item.accepted:
        scores.update(_rouge(last, item.accepted[0]))
    if item.task in ("multi_turn", "summarization"):
        pairs = [_rouge(a, f)["rougeL"] for a, f in zip(answers, full, strict=True)]
        scores["rougeL_full"] = sum(pairs) / len(pairs)
    return scores


def summarise(
    items: Sequence[Item],
    settings: Sequence[Setting],
    records: Mapping[tuple[Setting, str, str], Record],
    timings: Sequence[Timing],
    config: ModelConfig | None,
    ratings: Mapping[tuple[Setting, str, str, str], float | None] | None = None,
) -> list[Row]:
    """A row per setting and task that has all its answers; others are left out. `config` is None
    where the model's shape is not known (over HTTP)."""
    rows = []
    for task in dict.fromkeys(item.task for item in items):
        of_task = [item for item in items if item.task == task]
        for setting in settings:
            found = [records.get((setting, task, item.id)) for item in of_task]
            fulls = [records.get((FULL, task, item.id)) for item in of_task]
            if not all(found) or not all(fulls):
                continue
            answered = [r for r in found if r is not None]
            judged = [
                item_scores(item, one.answers, whole.answers if whole else ())
                for item, one, whole in zip(of_task, answered, fulls, strict=True)
            ]
            names = dict.fromkeys(name for scores in judged for name in scores)
            headline = headline_of(task, names)
            groups = {
                group: _score(
                    headline,
                    [s[headline] for i, s in zip(of_task, judged, strict=True) if i.group == group],
                )
                for group in dict.fromkeys(item.group for item in of_task)
            }
            skipped = sum(one.skipped_ffn_blocks for one in answered)
            total = sum(one.total_ffn_blocks for one in answered)
            ratio = skipped / total if total else 0.0
            times = [t for t in timings if t.setting == setting and t.task == task]
            reads = sum(t.ffn_weight_reads + t.ffn_weight_reads_avoided for t in times)
            avoided = sum(t.ffn_weight_reads_avoided for t in times)
            duration_s = sum(t.duration_s for t in times)
            is_timed = duration_s > 0 and setting.policy not in SLOW_POLICIES
            rows.append(
                Row(
                    setting=setting,
                    task=task,
                    scores={n: _score(n, [s[n] for s in judged if n in s]) for n in names},
                    groups=groups,
                    skipped_ffn_share=ratio,
                    weight_bytes_ratio=ratio * skipped_share(config, setting.policy)
                    if config
                    else None,
                    weight_skip_ratio=avoided / reads if reads else None,
                    tokens_per_s=sum(t.num_tokens for t in times) / duration_s
                    if is_timed
                    else None,
                    budget_tokens=mean_answer_tokens(records.values(), task)
                    if setting.policy == "early_exit"
                    else None,
                    ratings=_ratings(setting, task, ratings or {}),
                )
            )
    return rows


def _ratings(
    setting: Setting, task: str, ratings: Mapping[tuple[Setting, str, str, str], float | None]
) -> dict[str, Score]:
    by_aspect: dict[str, list[float]] = {}
    for (of_setting, of_task, _, aspect), rating in ratings.items():
        if (of_setting, of_task) == (setting, task) and rating is not None:
            by_aspect.setdefault(aspect, []).append(rating)
    return {a: Score(sum(v) / len(v), *bootstrap(v), len(v)) for a, v in by_aspect.items()}


def _score(name: str, values: Sequence[float]) -> Score:
    mean = sum(values) / len(values)
    is_share = name in _SHARES
    low, high = wilson(sum(values), len(values)) if is_share else bootstrap(values)
    return Score(mean, low, high, len(values))
