"""The policies that the paper compares with: what a token skips is known before its step.

    static      the FFN blocks of the highest mean similarity, the same ones for every token
    random      each FFN block of the skippable layers with one probability, drawn per token
    layer_drop  whole layers, those of the lowest Block Influence, for every token of the prompt
                and of the answer (ShortGPT, arXiv 2403.03853)
    early_exit  the layers behind an exit that comes the earlier the longer the answer is; their K
                and V are made of the residual at the exit (SkipDecode, arXiv 2307.02628)

The first two skip FFN blocks, as `ffn_skip` does. The other two leave out attention as well: they
are for comparison, run by torch's operators alone (`runner.whole_layers`), and not fast.

No torch here: the server process chooses the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from skipllm_core import sequence
from skipllm_core.types import SkipParams

WHOLE_LAYER_POLICIES = frozenset({"layer_drop", "early_exit"})


@dataclass(frozen=True, slots=True)
class PlannedSkip:
    """The layers whose FFN one token skips; `whole_layers`: their attention too."""

    layers: frozenset[int]
    whole_layers: bool = False


def planned_skip(seq: sequence.Sequence, position: int, num_generated: int) -> PlannedSkip | None:
    """What the token at `position` of `seq`, whose decoding generates output token `num_generated`
    (<= 0: a prompt's), skips under one of the baselines; None: nothing."""
    skip = seq.skip
    if skip.policy == "layer_drop":
        return _plan(skip.layers, whole_layers=True)
    if num_generated < max(1, skip.warmup_tokens):
        return None
    if skip.policy == "static":
        return _plan(skip.layers)
    if skip.policy == "random":
        return _plan(random_layers(skip, seq.params.seed, position))
    assert skip.policy == "early_exit"
    most = seq.num_prompt_tokens - seq.num_given_tokens + seq.params.max_tokens
    budget = skip.budget_tokens or most
    exit_layer = exit_at(num_generated, budget, skip.first_exit, skip.cold_start)
    return _plan(range(exit_layer, skip.cold_end), whole_layers=True)


def _plan(layers: Sequence[int], *, whole_layers: bool = False) -> PlannedSkip | None:
    return PlannedSkip(frozenset(layers), whole_layers) if layers else None


def random_layers(skip: SkipParams, seed: int, position: int) -> list[int]:
    """The draw depends on nothing but its arguments: a token that is computed again, after a
    preemption, skips what it skipped."""
    generator = Random((seed << 32) + position)  # noqa: S311 - no secret depends on it
    region = range(skip.cold_start, skip.cold_end)
    return [layer for layer in region if generator.random() < skip.probability]


def exit_at(num_generated: int, budget: int, first: int, last: int) -> int:
    """How many layers output token `num_generated` runs: from `first` for token 0 linearly down to
    `last` for token `budget` - 1, and so on from there."""
    share = num_generated / (budget - 1) if budget > 1 else 1.0
    return max(last, round(first - (first - last) * share))


def exit_range(ratio: float, num_layers: int) -> tuple[int, int]:
    """(first exit, last exit), whose mean leaves this share of the layers out. The first token runs
    all of them, where the last one can make up for that."""
    mean = num_layers * (1 - ratio)
    last = max(1, round(2 * mean - num_layers))
    return min(num_layers, max(last, round(2 * mean - last))), last


def best_layers(values: Sequence[float], ratio: float, layers: Sequence[int]) -> tuple[int, ...]:
    """Of `layers`, the round(ratio x all) with the highest values, ascending; ties: the lower."""
    count = round(ratio * len(values))
    return tuple(sorted(sorted(layers, key=lambda layer: (-values[layer], layer))[:count]))
