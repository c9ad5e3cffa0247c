"""The skip policies beside each other: ``python -m skipllm_core.demo.training.policies``.

What each of them does to the embedded model's next-token distributions, on the full model's text
(KL, top-1 agreement, perplexity), over the calibration prompts that were held out. Finer than
accuracy, which for most tasks is near the model's ceiling under all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import get_args

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from skipllm_core.calibration.answers import Answer
from skipllm_core.calibration.calibrate import HELD_OUT_EVERY
from skipllm_core.calibration.generate import complete
from skipllm_core.calibration.measure import measure
from skipllm_core.calibration.passes import Passes
from skipllm_core.calibration.work import Work
from skipllm_core.config import EngineConfig
from skipllm_core.demo import MODEL_DIR
from skipllm_core.demo.data.prompts import prompts
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, resolve_skip
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SkipParams, SkipPolicyName

NUM_PROMPTS = 128  # calibration's
BUDGET_TOKENS = 20  # of early_exit: about the mean length of the answers


def settings(
    profile: SkipProfile, ratios: Sequence[float], fixed: Sequence[str]
) -> Iterator[tuple[str, SkipParams]]:
    """(name, what it skips) of every policy and ratio, and of `static` with the layers given."""
    for policy in get_args(SkipPolicyName)[1:]:
        for ratio in ratios:
            budget = BUDGET_TOKENS if policy == "early_exit" else None
            wish = SkipOptions(policy=policy, ratio=ratio, budget_tokens=budget)
            yield f"{policy} {ratio:.0%}", resolve_skip(SkipDefaults(), profile, wish)
    for text in fixed:
        layers = tuple(map(int, text.split(",")))
        warmup = profile.warmup_tokens
        yield f"layers {text}", SkipParams(policy="static", layers=layers, warmup_tokens=warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.25, 0.35, 0.5])
    parser.add_argument(
        "--layers", nargs="+", default=[], help="FFN blocks to skip always, as 3,4,5; several"
    )
    args = parser.parse_args()
    profile = SkipProfile.load(MODEL_DIR / "skip.yaml")
    tokenizer = HFTokenizer(MODEL_DIR)
    chats = islice(prompts(), NUM_PROMPTS)
    held_out = [tokenizer.encode_chat(messages) for messages in chats][::HELD_OUT_EVERY]
    config = EngineConfig(model_dir=MODEL_DIR)
    runner = TorchModelRunner(config)
    table = Table(
        "policy", "weights left out", "reads spared, 8 rows", "top-1", "KL", "perplexity",
        "% of tokens that skip layer 0, 1, ...",
    )  # fmt: skip
    wanted = list(settings(profile, args.ratios, args.layers))
    with torch.inference_mode():
        unanswered = [Answer(prompt_ids, []) for prompt_ids in held_out]
        passes = Passes(runner)
        groups = passes.add(complete(runner, config, unanswered, 128, Work()))
        for name, skip in track(wanted, "measuring", console=Console(stderr=True)):
            (found,) = measure(passes, groups, [skip])
            shares = [count / found.num_tokens for count in found.skipped_layers]
            table.add_row(
                name,
                f"{found.skipped_ffn_share:.3f}",
                f"{found.weight_skip_ratio[8]:.3f}",
                f"{found.top1_agreement:.1%}",
                f"{found.kl:.4f}",
                f"{found.perplexity_change:+.1%}",
                " ".join(f"{100 * share:.0f}" for share in shares),
            )
    Console(file=sys.stdout, width=130).print(table)


if __name__ == "__main__":
    main()
