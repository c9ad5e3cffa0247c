"""The paged KV cache: where keys and values of every sequence live, in blocks of fixed size."""

from __future__ import annotations

import torch

from skipllm_core.model.config import ModelConfig


class KVCache:
    """Per layer, K and V in `num_blocks` blocks of `block_size` tokens.

        keys[layer], values[layer]: [num_blocks, block_size, num_kv_heads, head_dim]
        slot of a token            = block * block_size + offset in the block

    The memory is not initialised: a reader must only ask for slots that were written.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device = device
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.keys = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        # The same memory by slot: [num_blocks * block_size, num_kv_heads, head_dim].
        self._key_slots = [keys.flatten(0, 1) for keys in self.keys]
        self._value_slots = [values.flatten(0, 1) for values in self.values]

    @staticmethod
    def block_bytes(config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, K and V together."""
        slot_elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return block_size * slot_elements * dtype.itemsize

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Stores keys and values [num_tokens, num_kv_heads, head_dim] at slots [num_tokens]."""
        self._key_slots[layer].index_copy_(0, slots, keys)
        self._value_slots[layer].index_copy_(0, slots, values)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys and values, each [num_seqs, span, num_kv_heads, head_dim], at slots
        [num_seqs, span]."""
        flat = slots.flatten()
        keys = self._key_slots[layer].index_select(0, flat)
        values = self._value_slots[layer].index_select(0, flat)
        shape = (*slots.shape, *keys.shape[1:])
        return keys.view(shape), values.view(shape)
