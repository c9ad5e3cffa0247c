"""Attention over the paged KV cache, for flat batches of several sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.layers import Rotary


class ContextRow(NamedTuple):
    """One sequence of a step: its tokens at `start .. start + num_tokens - 1` are computed now,
    those before `start` are in the cache. The block table has room for all of them."""

    start: int
    num_tokens: int
    block_table: Sequence[int]


@dataclass(frozen=True, slots=True)
class AttentionSpan:
    """Sequences that attend in one call, and what each of them sees.

    `tokens` are theirs among the flat tokens: num_seqs x query_len of them. `slots` [num_seqs,
    span] is where their keys lie in the cache; shorter rows are padded with their own last slot,
    so that nothing of another sequence (not even a NaN) can reach them. `mask` [num_seqs, 1,
    query_len, span] is true where a query sees a key; None: every query sees the whole span, or,
    where `is_causal`, the keys up to its own.
    """

    tokens: slice
    slots: Tensor
    mask: Tensor | None
    is_causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionContext:
    """One forward over the flat tokens of several sequences: prefill chunks, decode tokens or both.

    Built once per step; the layer loop only reads it, so it never waits for the device.
    """

    kv_cache: KVCache
    slot_mapping: Tensor  # [num_tokens]: where each token's K and V are written
    cos: Tensor  # [num_tokens, 1, head_dim]
    sin: Tensor  # [num_tokens, 1, head_dim], see Rotary
    spans: dict[int | None, tuple[AttentionSpan, ...]]  # by the layer's window

    @classmethod
    def build(
        cls,
        rows: Sequence[ContextRow],
        *,
        rotary: Rotary,
        windows: frozenset[int | None],
        kv_cache: KVCache,
    ) -> AttentionContext:
        """Turns the rows' numbers into the tensors that all layers share. `LlamaModel.context`
        knows the model's part of the arguments."""
        assert rows, "a step computes at least one row"
        assert all(row.num_tokens > 0 for row in rows), "every row computes at least one token"
        device, block_size = kv_cache.device, kv_cache.block_size
        query_lens = [row.num_tokens for row in rows]
        places = [
            (position, row.block_table[position // block_size] * block_size + position % block_size)
            for row in rows
            for position in range(row.start, row.start + row.num_tokens)
        ]
        positions, slot_mapping = torch.tensor(places, device=device).T.contiguous()
        max_blocks = max(len(row.block_table) for row in rows)
        block_tables = torch.tensor(  # [num_seqs, max_blocks], padded with 0
            [[*row.block_table, *[0] * (max_blocks - len(row.block_table))] for row in rows],
            device=device,
        )
        cos, sin = rotary.cos_sin(positions)
        return cls(
            kv_cache=kv_cache,
            slot_mapping=slot_mapping,
            cos=cos,
            sin=sin,
            spans={
                window: tuple(
                    _span(rows[first:last], tokens, block_tables[first:last], block_size, window)
                    for first, last, tokens in _groups(query_lens)
                )
                for window in windows
            },
        )


def _groups(query_lens: Sequence[int]) -> Iterator[tuple[int, int, slice]]:
    """(first row, last row + 1, their tokens): neighbouring decode rows together, others alone."""
    first = token = 0
    while first < len(query_lens):
        last = first + 1
        while query_lens[first] == 1 and last < len(query_lens) and query_lens[last] == 1:
            last += 1
        num_tokens = query_lens[first] * (last - first)
        yield first, last, slice(token, token + num_tokens)
        first, token = last, token + num_tokens


def _span(
    rows: Sequence[ContextRow],
    tokens: slice,
    block_tables: Tensor,
    block_size: int,
    window: int | None,
) -> AttentionSpan:
    """What rows of one query length see: from the first key in any query's window to the last."""
    device = block_tables.device
    query_len = rows[0].num_tokens
    lasts = [row.start + query_len - 1 for row in rows]
    firsts = [0 if window is None else max(0, row.start - window + 1) for row in rows]
    lens = [last - first + 1 for first, last in zip(firsts, lasts, strict=True)]

    first, last = torch.tensor([firsts, lasts], device=device)[..., None]  # [num_seqs, 1] each
    keys = first + torch.arange(max(lens), device=device)  # positions, [num_seqs, span]
    padded = keys.minimum(last)
    slots = block_tables.gather(1, padded // block_size) * block_size + padded % block_size

    is_windowed = window is not None and max(lens) > window  # so for some query, not for all
    if not is_windowed and query_len == 1 and min(lens) == max(lens):
        return AttentionSpan(tokens, slots, mask=None, is_causal=False)
    if not is_windowed and query_len == max(lens):
        return AttentionSpan(tokens, slots, mask=None, is_causal=True)
    queries = last - query_len + 1 + torch.arange(query_len, device=device)
    mask = keys[:, None] <= queries[..., None]  # [num_seqs, query_len, span]
    if is_windowed:
        mask &= keys[:, None] > queries[..., None] - window
    return AttentionSpan(tokens, slots, mask=mask[:, None], is_causal=False)


def attend(queries: Tensor, layer: int, window: int | None, ctx: AttentionContext) -> Tensor:
    """Softmax attention of queries [num_tokens, num_heads, head_dim] over their sequences' cached
    keys and values; the same shape. Each KV head serves num_heads / num_kv_heads query heads."""
    spans = ctx.spans[window]
    outputs = [_attend_span(queries[span.tokens], layer, span, ctx.kv_cache) for span in spans]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_span(queries: Tensor, layer: int, span: AttentionSpan, kv_cache: KVCache) -> Tensor:
    num_seqs = span.slots.shape[0]
    num_tokens, num_heads, head_dim = queries.shape
    query_len = num_tokens // num_seqs
    keys, values = kv_cache.read(layer, span.slots)  # [num_seqs, span, num_kv_heads, head_dim]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    num_kv_heads = keys.shape[1]
    if query_len == 1:
        # One query per sequence: the heads of a group are a KV head's queries, no copy of K and V.
        grouped = queries.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=span.mask)
        return out.reshape(num_tokens, num_heads, head_dim)
    by_head = queries.view(num_seqs, query_len, num_heads, head_dim).transpose(1, 2)
    if num_kv_heads != num_heads:
        keys = keys.repeat_interleave(num_heads // num_kv_heads, dim=1)
        values = values.repeat_interleave(num_heads // num_kv_heads, dim=1)
    out = F.scaled_dot_product_attention(
        by_head, keys, values, attn_mask=span.mask, is_causal=span.is_causal
    )
    return out.transpose(1, 2).reshape(num_tokens, num_heads, head_dim)
