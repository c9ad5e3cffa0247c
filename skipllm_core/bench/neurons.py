"""Thresholds that leave out a share of the FFN weights, whatever the weights say."""

from __future__ import annotations

import math

import torch

from skipllm_core.model.attention import ContextRow
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.llama import LlamaModel
from skipllm_core.runner.neurons import neuron_scores
from skipllm_core.skip.neurons import NeuronSkip

BLOCK_SIZE = 16


@torch.inference_mode()
def neuron_rule(model: LlamaModel, token_ids: list[int], share: float) -> NeuronSkip:
    """Leaves out about `share` of the FFN weights of tokens like these: quantiles of the scores
    that each layer gives them. As large a part of the neurons goes before up as of the others
    before down."""
    # q of the neurons go before up: 2 of 3 rows each; q of the others before down: 1 row each.
    # 3 share = 2 q + q (1 - q).
    quantile = (3 - math.sqrt(9 - 12 * share)) / 2
    num_tokens = len(token_ids)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    h = model.embed(torch.tensor(token_ids, device=model.embedding.device))
    kv_cache = KVCache(
        model.config,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        dtype=h.dtype,
        device=h.device,
    )
    ctx = model.context([ContextRow(0, num_tokens, list(range(num_blocks)))], kv_cache)
    up, down = [], []
    for block in model.blocks:
        h = block.attend(h, ctx)
        _, first, second = neuron_scores(block, h)
        up.append(_quantile(first, quantile))
        down.append(_quantile(second[first >= up[-1]], quantile))
        h = block.feed_forward(h)
    return NeuronSkip(tuple(up), tuple(down))


def _quantile(scores: torch.Tensor, quantile: float) -> float:
    ordered = scores.flatten().sort().values
    return float(ordered[min(int(quantile * len(ordered)), len(ordered) - 1)])
