"""Who holds which block of the KV cache. The tensors themselves belong to the runner."""

from __future__ import annotations

from skipllm_core.sequence import Sequence


def max_cached_tokens(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> int:
    """How many tokens of a sequence the KV cache may have to hold before it finishes.

    The last token generated is never computed on, so it takes no place.
    """
    return min(num_prompt_tokens + max_tokens, max_model_len) - 1


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens, lent to sequences by number.

    A sequence's `block_table` names its blocks in the order of its tokens:

        token t lives in block_table[t // block_size] at offset t % block_size
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the warmest block goes first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_missing(self, seq: Sequence, num_tokens: int) -> int:
        """How many more blocks the sequence needs to hold `num_tokens` tokens."""
        return max(0, self.num_blocks_for(num_tokens) - len(seq.block_table))

    def grow(self, seq: Sequence, num_tokens: int) -> None:
        """Lends the sequence the blocks it misses to hold `num_tokens` tokens."""
        num_missing = self.num_missing(seq, num_tokens)
        assert num_missing <= self.num_free, "the scheduler asks before it takes"
        seq.block_table.extend(self._free.pop() for _ in range(num_missing))

    def release(self, seq: Sequence) -> None:
        """Takes all blocks of the sequence back."""
        self._free.extend(reversed(seq.block_table))
        seq.block_table.clear()
        assert len(self._free) <= self.num_blocks, "a block was given back twice"
