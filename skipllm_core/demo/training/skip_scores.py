"""What skipping costs the embedded model's knowledge: ``python -m
skipllm_core.demo.training.skip_scores``.

Scores four answers to each held-out question about a fact, as a multiple-choice benchmark does, in
one pass each: nothing is generated, and what is skipped is skipped over question and answer.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from skipllm_core.config import EngineConfig
from skipllm_core.demo import MODEL_DIR
from skipllm_core.demo.data.dialogues import user
from skipllm_core.demo.data.exchanges import FactBook, answer, ask
from skipllm_core.engine.engine import Engine
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, resolve_skip
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SamplingParams, SkipParams, SkipPolicyName
from skipllm_core.worker import build_engine

NUM_CHOICES = 4
POLICIES: tuple[SkipPolicyName, ...] = ("ffn_skip", "static", "random")


@dataclass(frozen=True, slots=True)
class Item:
    """One question, and answers of which the first is right and the others name another value."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """One pass over the items."""

    accuracy: float  # of choosing the answer with the highest log-probability
    logprob: float  # per token of the right answers
    token_skip_ratio: float


def choice_set(limit: int, seed: int = 1) -> list[Item]:
    """``limit`` items; the same arguments give the same set."""
    rng = random.Random(f"choices:{seed}")  # noqa: S311 - no secret depends on it
    book = FactBook()
    items = []
    for fact in rng.sample(book.facts, len(book.facts)):
        values = sorted({other.value for other in book.by_relation[fact.relation]} - {fact.value})
        if fact.relation == "single" or len(values) < NUM_CHOICES - 1:
            continue
        question, _ = ask(fact, rng, held_out=True, informal=False)
        chosen = [fact.value, *rng.sample(values, NUM_CHOICES - 1)]
        items.append(Item(question, tuple(answer(replace(fact, value=value)) for value in chosen)))
    return items[:limit]


def score(
    engine: Engine, tokenizer: HFTokenizer, items: Sequence[Item], skip: SkipParams
) -> Result:
    """One pass, with all answers in the engine at once."""
    lengths: list[int] = []  # of the answers, in tokens
    for item in items:
        prompt_ids = tokenizer.encode_chat([user(item.question)], add_generation_prompt=True)
        for text in item.answers:
            ids = tokenizer.encode(text, add_special_tokens=False)
            params = SamplingParams(max_tokens=0, prompt_logprobs=0, skip=skip)
            engine.add(len(lengths), prompt_ids + ids, params)
            lengths.append(len(ids))
    logprobs: list[list[float]] = [[] for _ in lengths]
    skipped = total = 0
    while (step := engine.step()) is not None:
        for output in step.outputs:
            logprobs[output.seq_id] += [found.logprob for found in output.prompt_logprobs]
            if output.finish_reason is not None and output.skip_usage is not None:
                skipped += output.skip_usage.skipped_ffn_blocks
                total += output.skip_usage.total_ffn_blocks
    sums = [sum(row[-length:]) for row, length in zip(logprobs, lengths, strict=True)]
    groups = [sums[n : n + NUM_CHOICES] for n in range(0, len(sums), NUM_CHOICES)]
    return Result(
        sum(max(group) == group[0] for group in groups) / len(groups),
        sum(group[0] for group in groups) / sum(lengths[::NUM_CHOICES]),
        skipped / total if total else 0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.25, 0.35, 0.5])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--limit", type=int, default=200, help="questions")
    args = parser.parse_args()
    engine = build_engine(EngineConfig(model_dir=args.model))
    tokenizer = HFTokenizer(args.model)
    profile = SkipProfile.load(args.model / "skip.yaml")
    items = choice_set(args.limit)
    table = Table("policy", "skip ratio asked for", "got", "accuracy", "log-probability per token")
    passes: list[tuple[SkipPolicyName, float]] = [("never", 0.0)]
    passes += [(policy, ratio) for policy in args.policies for ratio in args.ratios]
    for policy, ratio in track(passes, "scoring", console=Console(stderr=True)):
        options = SkipOptions(policy=policy, ratio=ratio, prompt=True)
        # No warm-up: it would count from the question's first token, and hide most of what is lost.
        skip = replace(resolve_skip(SkipDefaults(), profile, options), warmup_tokens=0)
        result = score(engine, tokenizer, items, skip)
        table.add_row(
            policy,
            f"{ratio:.0%}",
            f"{result.token_skip_ratio:.3f}",
            f"{result.accuracy:.1%}",
            f"{result.logprob:.4f}",
        )
    Console(file=sys.stdout, width=100).print(table)


if __name__ == "__main__":
    main()
