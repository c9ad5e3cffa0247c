"""What the full model looks like from inside, over the answers that settings are chosen by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipllm_core.calibration.passes import Group, Passes
from skipllm_core.model.llama import Block
from skipllm_core.runner.neurons import neuron_scores
from skipllm_core.skip.policy import similarity

MAX_RECORDED_TOKENS = 2**16  # the similarities of more are not kept: every n-th token's are
MAX_SCORES = 2**18  # kept of a layer's neurons, at random
SCORED_TOKENS = 256  # of a group, at most


@dataclass(frozen=True, slots=True)
class Recording:
    """Of the tokens kept: the similarity of each layer [num_kept, num_layers], and how many tokens
    their answers had before them [num_kept]. Of all of them: the layers' Block Influence. Of some
    behind the warm-up, by layer: pairs of a neuron's scores before up and before down [2, n]."""

    similarities: Tensor
    generated: Tensor
    block_influence: list[float]
    num_tokens: int
    scores: list[Tensor]


def record(
    passes: Passes,
    groups: Sequence[Group],
    warmup_tokens: int,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Recording:
    """Passes the groups, which have a token that is decoded, through the full model."""
    num_tokens = sum(group.num_tokens for group in groups)
    every = math.ceil(num_tokens / MAX_RECORDED_TOKENS)
    watch = _Watch(passes.model.config.num_layers, math.ceil(MAX_SCORES / len(groups)))
    similarities, generated = [], []
    first = 0
    for group in groups:
        before = torch.cat([torch.arange(1, seq.num_output_tokens) for seq in group.seqs])
        watch.begin((before >= warmup_tokens).nonzero()[:, 0])
        passes.in_full(group, watch.see)
        kept = torch.arange((-first) % every, group.num_tokens, every)
        similarities.append(torch.stack(watch.similarities, dim=-1).cpu()[kept])
        generated.append(before[kept])
        first += group.num_tokens
        on_tokens(group.num_tokens)
    return Recording(
        torch.cat(similarities),
        torch.cat(generated),
        [1.0 - cosine / num_tokens for cosine in watch.layer_cosines],
        num_tokens,
        [torch.cat(scores, dim=1) for scores in watch.scores],
    )


class _Watch:
    """What is kept of a pass in full, layer by layer."""

    def __init__(self, num_layers: int, scores_per_group: int) -> None:
        self.similarities: list[Tensor] = []  # of the group, by layer
        self.layer_cosines = [0.0] * num_layers  # sums of cos(layer in, layer out)
        self.scores: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._scores_per_group = scores_per_group
        self._random = torch.Generator().manual_seed(0)
        self._scored = torch.empty(0)

    def begin(self, scored: Tensor) -> None:
        """The next pass; `scored` are tokens behind the warm-up."""
        self.similarities = []
        chosen = torch.randperm(len(scored), generator=self._random)[:SCORED_TOKENS]
        self._scored = scored[chosen]

    def see(self, layer: int, block: Block, h: Tensor, attended: Tensor, after: Tensor) -> None:
        self.similarities.append(similarity(attended, after))
        self.layer_cosines[layer] += float(similarity(h, after).double().sum())
        if not len(self._scored):
            return
        _, before_up, before_down = neuron_scores(block, attended[self._scored.to(h.device)])
        size = (self._scores_per_group,)
        chosen = torch.randint(before_up.numel(), size, generator=self._random).to(h.device)
        pair = torch.stack((before_up.flatten()[chosen], before_down.flatten()[chosen]))
        self.scores[layer].append(pair.cpu())
