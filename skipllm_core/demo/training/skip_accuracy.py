"""What skipping costs the embedded model: ``python -m skipllm_core.demo.training.skip_accuracy``.

Answers the held-out prompts with the engine that serves them, greedily, once per policy and ratio.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from skipllm_core.config import EngineConfig
from skipllm_core.demo import MODEL_DIR
from skipllm_core.demo.data.heldout import KINDS, HeldOut, held_out_set, is_right
from skipllm_core.engine.engine import Engine
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, resolve_skip
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SamplingParams, SkipParams, SkipPolicyName
from skipllm_core.worker import build_engine

POLICIES: list[SkipPolicyName] = ["neurons", "ffn_skip"]


@dataclass(frozen=True, slots=True)
class Result:
    """One pass over the prompts."""

    accuracy: dict[str, float]  # by kind
    skipped_ffn_share: float
    weight_skip_ratio: float


def answer_all(
    engine: Engine, tokenizer: HFTokenizer, items: Sequence[HeldOut], skip: SkipParams
) -> tuple[list[str], float, float]:
    """(replies, skipped_ffn_share, weight_skip_ratio), with all items in the engine at once."""
    for seq_id, item in enumerate(items):
        prompt_ids = tokenizer.encode_chat(list(item.messages), add_generation_prompt=True)
        params = SamplingParams(
            max_tokens=min(160, engine.info.max_model_len - len(prompt_ids)),
            temperature=0.0,
            stop_token_ids=tuple(tokenizer.eos_token_ids),
            skip=skip,
        )
        engine.add(seq_id, prompt_ids, params)
    tokens: list[list[int]] = [[] for _ in items]
    skipped = total = 0
    avoided = read = 0.0
    while (step := engine.step()) is not None:
        for output in step.outputs:
            tokens[output.seq_id] += output.token_ids
            if output.finish_reason is not None and output.skip_usage is not None:
                skipped += output.skip_usage.skipped_ffn_rows
                total += output.skip_usage.total_ffn_rows
        assert step.stats is not None, "no grammar was refused"
        avoided += step.stats.ffn_weight_reads_avoided
        read += step.stats.ffn_weight_reads
    replies = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    return replies, skipped / total, avoided / (avoided + read)


def measure(
    engine: Engine,
    tokenizer: HFTokenizer,
    profile: SkipProfile,
    items: Sequence[HeldOut],
    policy: SkipPolicyName,
    ratio: float,
) -> Result:
    """One pass over the items under a policy at one of the profile's ratios."""
    skip = resolve_skip(SkipDefaults(), profile, SkipOptions(policy=policy, ratio=ratio))
    replies, skipped_ffn_share, weight_skip_ratio = answer_all(engine, tokenizer, items, skip)
    judged = [(item.kind, is_right(item, text)) for item, text in zip(items, replies, strict=True)]
    accuracy = {}
    for kind in {item.kind: None for item in items}:
        right = [is_so for of_kind, is_so in judged if of_kind == kind]
        accuracy[kind] = sum(right) / len(right)
    return Result(accuracy, skipped_ffn_share, weight_skip_ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.25, 0.35])
    parser.add_argument("--limit", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--max-num-seqs", type=int, default=8, help="rows of a decode step")
    args = parser.parse_args()
    engine = build_engine(EngineConfig(model_dir=args.model, max_num_seqs=args.max_num_seqs))
    tokenizer = HFTokenizer(args.model)
    profile = SkipProfile.load(args.model / "skip.yaml")
    items = [item for kind in KINDS for item in held_out_set(kind, args.limit)]
    progress = Console(stderr=True)
    passes: list[tuple[SkipPolicyName, float]] = [("never", 0.0)]
    passes += [(policy, ratio) for policy in args.policies for ratio in args.ratios]
    results = [
        measure(engine, tokenizer, profile, items, policy, ratio)
        for policy, ratio in track(passes, "answering", console=progress)
    ]
    table = Table("", *(f"{policy} {ratio:.0%}" for policy, ratio in passes))
    table.add_row("skipped_ffn_share", *(f"{r.skipped_ffn_share:.3f}" for r in results))
    table.add_row("weight_skip_ratio", *(f"{r.weight_skip_ratio:.3f}" for r in results))
    for kind in KINDS:
        table.add_row(kind, *(f"{r.accuracy[kind]:.1%}" for r in results))
    Console(file=sys.stdout, width=120).print(table)


if __name__ == "__main__":
    main()
