"""A step: attention always, the FFN where the gate says so.

Twice: with torch's operators on any device, and with the CPU's own kernels. Both ask the same gate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from skipllm_core.kernels.cpu import CpuDecoder
from skipllm_core.model.attention import AttentionContext
from skipllm_core.model.llama import Block, LlamaModel
from skipllm_core.runner.neurons import SeeNeurons, feed_forward_neurons
from skipllm_core.runner.whole_layers import without_attention
from skipllm_core.skip.neurons import NeuronRows
from skipllm_core.skip.policy import SkipGate, similarity


def decode_step(
    model: LlamaModel,
    token_ids: Tensor,
    ctx: AttentionContext,
    gate: SkipGate,
    sampling: list[int] | None = None,
) -> Tensor:
    """The logits [num_sampling, vocab] float32 of the rows `sampling` (None: all) of a step over
    token_ids [num_rows]; a row is one token.

    With a gate that never skips this is `model.head(model.forward(token_ids, ctx))`, bit for bit.
    """
    h = gated_forward(model, token_ids, ctx, gate)
    return head_of(model, h, range(h.shape[0]) if sampling is None else sampling)


def head_of(model: LlamaModel, h: Tensor, rows: Sequence[int]) -> Tensor:
    """The logits [number of rows, vocab] of `rows`, ascending, of h [num_rows, hidden]."""
    if len(rows) < h.shape[0]:
        h = h[torch.tensor(rows, dtype=torch.int64, device=h.device)]
    return model.head(h)


def gated_forward(
    model: LlamaModel,
    token_ids: Tensor,
    ctx: AttentionContext,
    gate: SkipGate,
    see_neurons: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """token_ids [num_tokens] -> h [num_tokens, hidden]; a row of the gate is one token.

    `see_neurons` is told of each layer what `SeeNeurons` says, of the rows that run it.
    """
    h = model.embed(token_ids)
    for layer, block in enumerate(model.blocks):
        rows = gate.rows_to_run(layer)
        attended = block.attend(h, ctx)  # of all rows: the KV cache must stay whole
        h = without_attention(attended, h, gate, rows) if gate.whole_layer_rows else attended
        if rows:
            see = None if see_neurons is None else partial(see_neurons, layer)
            after = _feed_forward(block, h, rows, layer, gate.neurons, see)
            if gate.watches(layer):
                gate.observe(layer, similarity(h, after).tolist())  # the layer's one transfer
            h = after
    return h


def _feed_forward(
    block: Block,
    h: Tensor,
    rows: Collection[int],
    layer: int,
    neurons: NeuronRows,
    see: SeeNeurons | None,
) -> Tensor:
    """h with the FFN block applied to `rows`; the others keep their residual, bit for bit."""
    index = None if len(rows) == h.shape[0] else torch.tensor(list(rows), device=h.device)
    some = h if index is None else h.index_select(0, index)
    if not neurons.has_rules:
        after = block.feed_forward(some)
    else:
        thresholds = neurons.thresholds(layer)
        after, counts = feed_forward_neurons(
            block, some, [thresholds[row] for row in rows], is_joint=neurons.is_joint, see=see
        )
        neurons.count(layer, counts.of_rows(rows, len(thresholds)))
    return after if index is None else h.index_copy(0, index, after)


def cpu_step(
    decoder: CpuDecoder,
    token_ids: list[int],
    positions: list[int],
    block_tables: list[list[int]],
    gate: SkipGate,
    sampling: list[int] | None = None,
) -> Tensor:
    """`decode_step` by the CPU's kernels, a row being one token."""
    cpu_forward(decoder, token_ids, positions, block_tables, gate)
    return decoder.logits(sampling)


def cpu_forward(
    decoder: CpuDecoder,
    token_ids: list[int],
    positions: list[int],
    block_tables: list[list[int]],
    gate: SkipGate,
) -> None:
    """`gated_forward` by the CPU's kernels, which hold what comes out of the layers."""
    num_rows = len(token_ids)
    decoder.begin(token_ids, positions, block_tables)
    for layer in range(decoder.num_layers):
        decoder.attend(layer)
        rows = gate.rows_to_run(layer)
        if rows:
            some = None if len(rows) == num_rows else list(rows)
            if gate.neurons.has_rules:
                counts, similarities = decoder.feed_forward_neurons(
                    layer,
                    some,
                    gate.neurons.thresholds(layer),
                    is_joint=gate.neurons.is_joint,
                    is_watched=gate.watches(layer),
                )
                gate.neurons.count(layer, counts)
                if similarities is not None:
                    gate.observe(layer, similarities)
            elif gate.watches(layer):
                gate.observe(layer, decoder.feed_forward_watched(layer, some))
            else:
                decoder.feed_forward(layer, some)
