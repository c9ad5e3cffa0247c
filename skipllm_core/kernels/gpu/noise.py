"""Random numbers of a sampled token: a function of its sequence's seed and its index alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def exponentials(out: torch.Tensor, seeds: torch.Tensor, indices: torch.Tensor) -> None:
    """Fills out [num_rows, vocab] float32 with Exp(1) variates: row r's are those of the output
    token `indices[r]` [num_rows] int32 of the sequence with `seeds[r]` [num_rows] int64.

    Counter-based (Philox 4x32-10, Salmon et al. 2011): key = seed, counter = (token id, index).
    """
    num_rows, vocab_size = out.shape
    assert out.stride(1) == 1
    grid = (num_rows, triton.cdiv(vocab_size, _BLOCK))
    _exponentials_kernel[grid](out, seeds, indices, vocab_size, out.stride(0), BLOCK=_BLOCK)


@triton.jit
def _exponentials_kernel(out, seeds, indices, vocab_size, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token_ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zeros = token_ids * 0
    bits, _, _, _ = tl.philox(
        tl.load(seeds + row), token_ids, zeros + tl.load(indices + row), zeros, zeros
    )
    # The middles of 2**23 cells of (0, 1), exact in float32. (Those of 2**24 are not: the last one
    # rounds to 1, whose variate is 0, and a token with that is drawn whatever its logit.)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    tl.store(
        out + row.to(tl.int64) * stride + token_ids, -tl.log(uniform), mask=token_ids < vocab_size
    )
