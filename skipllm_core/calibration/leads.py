"""Other ways to choose what `neurons` leaves out, measured against ours at equal shares of FFN
weights: ``python -m skipllm_core.calibration.leads MODEL_DIR``.

The full model answers the built-in prompts; three of four answers give the scores, the others are
measured on. Its findings are in docs/experiments.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from skipllm_core.calibration.answers import Answer
from skipllm_core.calibration.generate import complete
from skipllm_core.calibration.measure import Measurement, measure
from skipllm_core.calibration.neurons import shares_for, skip_of_shares
from skipllm_core.calibration.passes import Group, Passes
from skipllm_core.calibration.prompts import BUILT_IN
from skipllm_core.calibration.record import record
from skipllm_core.calibration.work import Work
from skipllm_core.config import EngineConfig
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SkipParams

HELD_OUT_EVERY = 4
PARTS = (1.0, 0.8, 0.6, 0.5, 0.25)  # of what is left out, that goes before up
BATCHES = (2, 4, 8)


def variants(scores: Sequence[Tensor], share: float) -> Iterator[tuple[str, SkipParams]]:
    """Names and settings that leave out this share of the FFN weights."""
    ours = shares_for(share)
    yield "ours", skip_of_shares(scores, *ours, 0)
    for part in PARTS:
        # Of a neuron, two rows of three go before up, and one before down.
        before_up = 1.5 * part * share
        before_down = 3 * share - before_up
        if before_down < 1:
            name = "one threshold" if part == 1 else f"{part:.0%} of it before up"
            yield name, skip_of_shares(scores, before_up, before_down, 0)
    all_layers = skip_of_shares([torch.cat(list(scores), dim=1)], *ours, 0)
    same = SkipParams(
        policy="neurons",
        warmup_tokens=0,
        up_thresholds=all_layers.up_thresholds * len(scores),
        down_thresholds=all_layers.down_thresholds * len(scores),
    )
    yield "the same thresholds in all layers", same


def in_batches(passes: Passes, answers: Sequence[Answer], size: int) -> list[Group]:
    """Batches of answers of about the same length, in which a step has hardly fewer rows."""
    by_length = sorted(answers, key=lambda answer: len(answer.answer_ids))
    return [
        group
        for first in range(len(answers) % size, len(answers), size)
        for group in passes.add(by_length[first : first + size])
    ]


def _show(name: str, found: Measurement) -> None:
    print(  # noqa: T201
        f"{name:36} bytes {found.skipped_ffn_share:.3f}  KL {found.kl:.4f}  "
        f"top-1 agreement {found.top1_agreement:.3f}  ({found.num_tokens} tokens)",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--prompts", type=int, default=len(BUILT_IN), help="how many of them")
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--answers", type=Path, help="where answers are kept for the next run")
    args = parser.parse_args()
    config, tokenizer = EngineConfig(model_dir=args.model), HFTokenizer(args.model)
    runner = TorchModelRunner(config)
    asked = [
        Answer(
            tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True),
            [],
        )
        for text in BUILT_IN[: args.prompts]
    ]
    work = Work(args.answers, {"model": str(args.model), "max_tokens": args.max_tokens})
    answers = complete(runner, config, asked, args.max_tokens, work)
    held_out = answers[::HELD_OUT_EVERY]
    passes = Passes(runner)
    groups = passes.add([a for n, a in enumerate(answers) if n % HELD_OUT_EVERY])
    scores = record(passes, groups, 0).scores
    held_out_groups = passes.add(held_out)
    for share in args.shares:
        print(f"\n{share:.0%} of the FFN weights", flush=True)  # noqa: T201
        for name, skip in variants(scores, share):
            _show(name, measure(passes, held_out_groups, [skip])[0])
    skip = skip_of_shares(scores, *shares_for(0.2), 0)
    print("\n20 %, left out together", flush=True)  # noqa: T201
    batches = Passes(runner, tokens_at_once=sys.maxsize)
    for size in BATCHES:
        of_size = in_batches(batches, held_out, size)
        found = measure(batches, of_size, [skip], is_together=True)[0]
        _show(f"{size} rows", found)


if __name__ == "__main__":
    main()
