"""The decoder that Llama, Mistral, Qwen2 and Qwen3 share; `ModelConfig` tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from skipllm_core.model.attention import AttentionContext, ContextRow, attend
from skipllm_core.model.config import ModelConfig
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.layers import FeedForward, Linear, Place, RMSNorm, Rotary, rotate, weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; Q, K and V come from one matrix."""

    def __init__(self, config: ModelConfig, layer: int, *, place: Place) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.windows[layer]
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.qkv = Linear(
            config.hidden_size,
            q_size + 2 * kv_size,
            bias=config.qkv_bias,
            place=place,
        )
        self.o = Linear(q_size, config.hidden_size, bias=config.o_bias, place=place)
        # One norm for queries and keys: their weights stand head by head, the keys' last.
        num_qk_heads = config.num_heads + config.num_kv_heads
        self.qk_norm = (
            RMSNorm(num_qk_heads, config.head_dim, eps=config.rms_norm_eps, place=place)
            if config.qk_norm
            else None
        )

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """x [num_tokens, hidden] -> [num_tokens, hidden]; writes K and V of all its tokens."""
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)  # queries, keys, values
        rotated, values = heads[:, : -self.num_kv_heads], heads[:, -self.num_kv_heads :]
        if self.qk_norm is not None:
            rotated = self.qk_norm(rotated)
        rotated = rotate(rotated, ctx.cos, ctx.sin)
        queries, keys = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        ctx.kv_cache.write(self.layer, ctx.slot_mapping, keys, values)
        out = attend(queries, self.layer, self.window, ctx)
        return cast(Tensor, self.o(out.flatten(1)))


class Block(nn.Module):
    """One decoder layer, as its two residual halves."""

    def __init__(self, config: ModelConfig, layer: int, *, place: Place) -> None:
        super().__init__()
        eps, hidden = config.rms_norm_eps, config.hidden_size
        self.norm1 = RMSNorm(hidden, eps=eps, place=place)
        self.attention = Attention(config, layer, place=place)
        self.norm2 = RMSNorm(hidden, eps=eps, place=place)
        self.ffn = FeedForward(config, place=place)

    def attend(self, h: Tensor, ctx: AttentionContext) -> Tensor:
        """h + Attn(norm1(h)) for h [num_tokens, hidden], the tokens of `ctx`."""
        return cast(Tensor, h + self.attention(self.norm1(h), ctx))

    def feed_forward(self, h: Tensor) -> Tensor:
        """h + FFN(norm2(h)) for any rows h [num_rows, hidden]."""
        return cast(Tensor, h + self.ffn(self.norm2(h)))


class LlamaModel(nn.Module):
    """A decoder-only language model over flat token batches.

    The weights are uninitialised after construction: `loader.load_model` fills them.
    """

    def __init__(self, config: ModelConfig, *, place: Place) -> None:
        super().__init__()
        self.config = config
        self.embedding = weight(config.vocab_size, config.hidden_size, place=place)
        self.blocks = [Block(config, layer, place=place) for layer in range(config.num_layers)]
        self._registered_blocks = nn.ModuleList(self.blocks)  # parameters() finds them here
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, place=place)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, place=place)
        if config.tie_word_embeddings and self.lm_head.scale is None:
            self.lm_head.weight = self.embedding
        self.rotary = Rotary(config, place=place)

    @property
    def num_parameters(self) -> int:
        """As the checkpoint counts them: without scales, and a tied head once."""
        counted = {name: p.numel() for name, p in self.named_parameters() if "scale" not in name}
        if self.config.tie_word_embeddings:
            counted.pop("lm_head.weight", None)
        return sum(counted.values())

    def context(self, rows: Sequence[ContextRow], kv_cache: KVCache) -> AttentionContext:
        """The context of one step over `rows`, for `forward` or a loop over the blocks."""
        return AttentionContext.build(
            rows, rotary=self.rotary, windows=frozenset(self.config.windows), kv_cache=kv_cache
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [num_tokens] -> h [num_tokens, hidden]."""
        return F.embedding(token_ids, self.embedding)

    def forward(self, token_ids: Tensor, ctx: AttentionContext) -> Tensor:
        """token_ids [num_tokens] -> h [num_tokens, hidden] after every block in full."""
        h = self.embed(token_ids)
        for block in self.blocks:
            h = block.feed_forward(block.attend(h, ctx))
        return h

    def head(self, h: Tensor) -> Tensor:
        """h [num_rows, hidden] -> logits [num_rows, vocab], float32; the final norm is inside."""
        return cast(Tensor, self.lm_head(self.norm(h)).float())
