"""Who holds which block of the KV cache. The tensors themselves belong to the runner."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from itertools import count

from skipllm_core.sequence import Sequence

_ROOT = 0  # the content id before a prompt's first block


def max_cached_tokens(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> int:
    """How many tokens of a sequence the KV cache may have to hold before it finishes.

    The last token generated is never computed on, so it takes no place.
    """
    if not max_tokens:
        return num_prompt_tokens
    return min(num_prompt_tokens + max_tokens, max_model_len) - 1


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens, lent to sequences by number.

    A sequence's `block_table` names its blocks in the order of its tokens:

        token t lives in block_table[t // block_size] at offset t % block_size

    Full blocks of a prompt are published once they are computed, and lent to every later sequence
    whose prompt begins alike. Blocks with output tokens are not: their K/V depend on what was
    skipped. A block is

        held     by one sequence or more
        cached   published and held by none: found until it is taken, the least recently used first
        blank    the rest; taken before cached ones

    A published block is found by its key: the content id of the block before it, and its own token
    ids; of a prompt's first block, the request's salt, too. A content id is given to one block's
    content and never again, so it stands for all tokens up to there; and a dict compares whole
    keys, so prompts whose hashes collide do not meet.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._num_holders = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: the warmest block goes first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._published: dict[bytes, int] = {}  # the block with a key
        self._keys: list[bytes | None] = [None] * num_blocks  # of each block; None: not published
        self._content_ids = [_ROOT] * num_blocks  # of each published block
        self._next_content_id = count(_ROOT + 1)

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_missing(self, seq: Sequence, num_tokens: int) -> int:
        """How many more blocks the sequence needs to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(seq.block_table))

    def grow(self, seq: Sequence, num_tokens: int) -> None:
        """Lends the sequence the blocks it misses to hold `num_tokens` tokens."""
        num_missing = self.num_missing(seq, num_tokens)
        assert num_missing <= self.num_free, "the scheduler asks before it takes"
        seq.block_table.extend(self._take() for _ in range(num_missing))

    def release(self, seq: Sequence) -> None:
        """Takes all blocks of the sequence back; the published ones stay to be found."""
        for block in reversed(
            seq.block_table
        ):  # the tail is of no use without the head: goes first
            self._num_holders[block] -= 1
            assert self._num_holders[block] >= 0, "a block was given back twice"
            if self._num_holders[block]:
                continue
            if self._keys[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None
        seq.block_table.clear()
        seq.num_published_blocks = 0
        seq.content_id = _ROOT

    # Prefix caching ------------------------------------------------------------------------------

    def find_prefix(self, seq: Sequence) -> list[int]:
        """The published blocks that the prompt begins with and that it may take."""
        prefix: list[int] = []
        if not self.enable_prefix_caching:
            return prefix
        content_id = _ROOT
        for index in range(seq.num_findable_tokens // self.block_size):
            block = self._published.get(self._key(content_id, seq, index))
            if block is None:
                break
            content_id = self._content_ids[block]
            prefix.append(block)
        return prefix

    def num_taken(self, prefix: list[int], num_tokens: int) -> int:
        """How many free blocks a sequence of `num_tokens` tokens takes that begins with `prefix`:
        all but those that others hold."""
        num_held = sum(self._num_holders[block] > 0 for block in prefix)
        return self.num_blocks_for(num_tokens) - num_held

    def share(self, seq: Sequence, prefix: list[int]) -> None:
        """Lends the blocks that `find_prefix` has just found to the sequence, as its first ones."""
        assert not seq.block_table
        for block in prefix:
            if not self._num_holders[block]:
                del self._cached[block]
            self._num_holders[block] += 1
        seq.block_table.extend(prefix)
        seq.num_published_blocks = len(prefix)
        if prefix:
            seq.content_id = self._content_ids[prefix[-1]]

    def publish(self, seq: Sequence) -> None:
        """Lets others find the blocks of the prompt that are computed; for use after a prefill
        step that succeeded. Where an equal block is published already, that one stays."""
        if not (self.enable_prefix_caching and seq.has_exact_prompt):
            return
        num_full = min(seq.num_computed_tokens, seq.num_prompt_tokens) // self.block_size
        for index in range(seq.num_published_blocks, num_full):
            key = self._key(seq.content_id, seq, index)
            block = self._published.get(key)
            if block is None:
                block = self._published[key] = seq.block_table[index]
                self._keys[block] = key
                self._content_ids[block] = next(self._next_content_id)
            seq.content_id = self._content_ids[block]
        seq.num_published_blocks = num_full

    def withdraw(self, seq: Sequence) -> None:
        """Lets nobody find the sequence's blocks any more: its K/V may be broken."""
        for block in seq.block_table:
            self._unpublish(block)

    def _key(self, content_id: int, seq: Sequence, index: int) -> bytes:
        """Of the sequence's block `index`. Python's hash of bytes is keyed at random per process:
        nobody can prepare prompts that all collide."""
        start = index * self.block_size
        token_ids = seq.token_ids[start : start + self.block_size]
        key = array("q", (content_id, *token_ids)).tobytes()
        # The blocks behind the first are told apart by its content id.
        return seq.params.cache_salt.encode() + key if content_id == _ROOT else key

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unpublish(block)
        self._num_holders[block] = 1
        return block

    def _unpublish(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._published[key]
            self._keys[block] = None
