"""What a decode step has to read, and so how fast it can be. No torch here.

bytes per step = weights + a row of the embedding per sequence + K/V that the sequences see
                 - one FFN block for each layer that every row skips
ceiling        = read bandwidth / bytes per step
"""

from __future__ import annotations

from dataclasses import dataclass

from skipllm_core.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """What a step that skips nothing reads of the weights: all but the embedding table, of which
    it reads a row per sequence. A tied head is the table, and is read whole."""

    total: int
    ffn_block: int  # of it: one layer's FFN and norm


def weight_bytes(config: ModelConfig, itemsize: int) -> WeightBytes:
    """Of a model whose weights all take `itemsize` bytes each."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = hidden * (q_size + 2 * kv_size) + q_size * hidden + hidden  # norm1 at the end
    attention += (q_size + 2 * kv_size) * config.qkv_bias + hidden * config.o_bias
    attention += (q_size + kv_size) * config.qk_norm
    ffn = 3 * hidden * inner + hidden + (2 * inner + hidden) * config.mlp_bias
    head = config.vocab_size * hidden + hidden
    return WeightBytes(
        total=(config.num_layers * (attention + ffn) + head) * itemsize,
        ffn_block=ffn * itemsize,
    )


def kv_bytes(config: ModelConfig, itemsize: int, *, context: int, steps: int) -> float:
    """K/V that one sequence reads in a step, over all layers: the mean of the steps that find
    `context`, `context + 1`, .. tokens in the cache. Each sees those, and its own."""
    token_bytes = 2 * config.num_kv_heads * config.head_dim * itemsize  # of one layer
    seen = range(context + 1, context + steps + 1)
    num_read = sum(
        num_seen if window is None else min(num_seen, window)
        for window in config.windows
        for num_seen in seen
    )
    return num_read * token_bytes / steps


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one decode step reads."""

    full: float  # by a step that skips nothing
    ffn_block: int

    @classmethod
    def of(
        cls,
        weights: WeightBytes,
        config: ModelConfig,
        itemsize: int,
        *,
        batch: int,
        context: int,
        steps: int,
    ) -> StepBytes:
        """`itemsize` is that of the embedding and of the K/V."""
        per_row = config.hidden_size * itemsize + kv_bytes(
            config, itemsize, context=context, steps=steps
        )
        return cls(weights.total + batch * per_row, weights.ffn_block)

    def read(self, num_avoided: float) -> float:
        """Bytes of a step in which so many layers' FFN blocks are skipped by every row."""
        return self.full - num_avoided * self.ffn_block

    def ideal_speedup(self, num_avoided: float) -> float:
        """Over a step that skips nothing, were reading all that takes time."""
        return self.full / self.read(num_avoided)
