"""Prompts of one length, so that all rows of a batch are at the same place. No torch here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count


def random_prompts(num_rows: int, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)  # noqa: S311 - no secret depends on it
    return [[rng.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num_rows)]


def joined_prompts(prompts: Sequence[list[int]], num_rows: int, num_tokens: int) -> list[list[int]]:
    """Prompts of one length out of prompts of any: row r ends with prompt r, and has the ones
    before it, as far as they fit, as its past."""
    rows = []
    for row in range(num_rows):
        joined: list[int] = []
        for back in count():
            if len(joined) >= num_tokens:
                break
            joined = prompts[(row - back) % len(prompts)] + joined
        rows.append(joined[-num_tokens:])
    return rows
