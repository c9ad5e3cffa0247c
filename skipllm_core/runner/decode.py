"""The decode step: attention always, the FFN where the gate says so."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from skipllm_core.model.attention import AttentionContext
from skipllm_core.model.llama import Block, LlamaModel
from skipllm_core.skip.policy import SkipGate


def decode_step(
    model: LlamaModel, token_ids: Tensor, ctx: AttentionContext, gate: SkipGate
) -> Tensor:
    """One token of every row: token_ids [num_rows] -> logits [num_rows, vocab] float32.

    With a gate that never skips this is `model.head(model.forward(token_ids, ctx))`, bit for bit.
    """
    return model.head(gated_forward(model, token_ids, ctx, gate))


def gated_forward(
    model: LlamaModel, token_ids: Tensor, ctx: AttentionContext, gate: SkipGate
) -> Tensor:
    """token_ids [num_tokens] -> h [num_tokens, hidden]; a row of the gate is one token."""
    h = model.embed(token_ids)
    for layer, block in enumerate(model.blocks):
        h = block.attend(h, ctx)  # always: the KV cache must stay whole
        rows = gate.rows_to_run(layer)
        if rows:
            after = _feed_forward(block, h, rows)
            gate.observe(layer, h, after)
            h = after
    return h


def _feed_forward(block: Block, h: Tensor, rows: Collection[int]) -> Tensor:
    """h with the FFN block applied to `rows`; the others keep their residual, bit for bit."""
    if len(rows) == h.shape[0]:
        return block.feed_forward(h)
    index = torch.tensor(list(rows), device=h.device)
    return h.index_copy(0, index, block.feed_forward(h.index_select(0, index)))
