"""Greedy answers by transformers' own layers, one token after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import DynamicCache, LlamaForCausalLM

# (residual, rotary, cache, tokens generated so far, position) -> (residual, layers skipped)
RunLayers = Callable[
    [torch.Tensor, object, DynamicCache, int, int], tuple[torch.Tensor, tuple[int, ...]]
]


@torch.inference_mode()
def answer_stepwise(
    oracle: LlamaForCausalLM, prompt: torch.Tensor, max_tokens: int, run_layers: RunLayers
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The tokens, and the layers whose FFN each of them skipped; the prompt runs in full."""
    cache = DynamicCache(config=oracle.config)
    logits = oracle(prompt[None], past_key_values=cache, use_cache=True).logits[:, -1]
    tokens, skipped_layers = [int(logits.argmax())], [()]
    while len(tokens) < max_tokens:
        h = oracle.model.embed_tokens(torch.tensor([tokens[-1:]]))
        position = len(prompt) + len(tokens) - 1
        rotary = oracle.model.rotary_emb(h, torch.tensor([[position]]))
        h, skips = run_layers(h, rotary, cache, len(tokens), position)
        tokens.append(int(oracle.lm_head(oracle.model.norm(h)).argmax()))
        skipped_layers.append(skips)
    return tokens, skipped_layers
