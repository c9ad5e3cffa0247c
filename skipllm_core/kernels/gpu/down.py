"""The linear that ends an FFN block: h += x W^T, W [hidden, inner] lying neuron by neuron.

    memory    d_0: hidden elements | d_1: hidden elements | ...    what a neuron adds to h

So a neuron that is left out is one run of memory that is not read. A program has BLOCK_N elements
of the residual and a part (SPLITS) of the neurons, whose sums `add_parts_kernel` adds in a fixed
order: a row has to be cut somewhere, and reads of few elements here and there are slow.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from skipllm_core.kernels.gpu.linear import (
    MAX_SPLITS,
    Tile,
    Tiles,
    block_m,
    num_stages_for,
)
from skipllm_core.kernels.gpu.linear_kernels import add_parts_kernel, finish
from skipllm_core.kernels.gpu.neuron_kernels import is_voter_of
from skipllm_core.kernels.gpu.neuron_state import NeuronState
from skipllm_core.model.layers import Linear

NUM_PROGRAMS = 528  # four for each multiprocessor of an H100 or H200

# What `flags` of a neuron say, added up.
WANTED = tl.constexpr(1)  # some row wants its weights
GONE_JOINTLY = tl.constexpr(2)  # the rows that leave out together leave it out


def down_tile_for(num_rows: int, num_outputs: int, num_inputs: int) -> Tile:
    """The tile for a shape: heuristics, not yet swept on a device."""
    widest = max(16, triton.next_power_of_2(num_outputs))
    block_n = min(256 if num_rows == 1 else 64, widest)
    block_k = 32 if num_rows == 1 else 64
    programs = -(-num_outputs // block_n)
    most = max(1, num_inputs // (4 * block_k))  # a program has four steps at least
    limit = MAX_SPLITS if num_rows == 1 else 8
    return Tile(block_n, block_k, min(limit, most, max(1, NUM_PROGRAMS // programs)), num_stages=4)


@triton.jit
def down_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, h_ptr, parts_ptr, run_ptr, flags_ptr, limits_ptr,
    num_rows, N, K,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_PREDICATED: tl.constexpr,
    LEAVES_OUT: tl.constexpr, IS_JOINT: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = m < num_rows
    if IS_PREDICATED:
        runs = tl.load(run_ptr + m, mask=keep, other=0)
        if tl.max(runs, 0) == 0:
            return
        keep = keep & (runs == 1)
    if IS_JOINT:
        is_voter = is_voter_of(limits_ptr, m, keep)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = n < N
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    first = tl.program_id(1) * steps * BLOCK_K
    end = tl.minimum(first + steps * BLOCK_K, K)
    sums = tl.zeros((BLOCK_K if BLOCK_M == 1 else BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(first, end, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        is_input = k < end
        is_wanted = is_input
        if LEAVES_OUT:
            flags = tl.load(flags_ptr + tl.program_id(2) * K + k, mask=is_input, other=0)
            is_wanted = (flags & WANTED) != 0
        w = tl.load(
            w_ptr + k[:, None] * N + n[None, :],
            mask=is_wanted[:, None] & is_output[None, :],
            other=0.0,
            eviction_policy="evict_first",  # every weight is read once a step
        )
        if BLOCK_M == 1:
            x = tl.load(x_ptr + k, mask=is_input, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * x[:, None]
        else:
            is_kept = keep[:, None] & is_input[None, :]
            if IS_JOINT:
                is_kept = is_kept & ~(is_voter[:, None] & (flags >= GONE_JOINTLY)[None, :])
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=is_kept, other=0.0)
            sums = tl.dot(x, w.to(x.dtype), sums, input_precision="ieee")
    if BLOCK_M == 1:
        sums = tl.sum(sums, 0)[None, :]
    if SPLITS == 1:
        finish(
            sums, h_ptr, h_ptr, scale_ptr, bias_ptr, m, n, keep, is_output, N,
            True, False, HAS_SCALE, HAS_BIAS,
        )  # fmt: skip
    else:
        at = (tl.program_id(1) * num_rows + m[:, None]) * N + n[None, :]
        tl.store(parts_ptr + at, sums, mask=keep[:, None] & is_output[None, :])


def down(
    act: Tensor,
    weights: Linear,
    h: Tensor,
    num_rows: int,
    parts: Tensor,
    *,
    run: Tensor | None = None,
    neurons: tuple[NeuronState, int] | None = None,
    tiles: Tiles = down_tile_for,
) -> None:
    """h[:num_rows] += act W^T; act [max_num_rows, inner], h [max_num_rows, hidden].

    `run` as for `linear`. `parts`: float32 scratch for the splits. `neurons` (state, layer): behind
    `leave_out`, only what some row wants is read.
    """
    hidden, inner = weights.weight.shape
    assert weights.weight.stride() == (1, hidden), "neuron by neuron"
    assert hidden * inner < 2**31
    tile = tiles(num_rows, hidden, inner)
    splits = min(tile.splits, max(1, parts.numel() // (num_rows * hidden)))
    shared = {
        "HAS_SCALE": weights.scale is not None,
        "HAS_BIAS": weights.bias is not None,
        "IS_PREDICATED": run is not None,
        "SPLITS": splits,
        "BLOCK_M": block_m(num_rows),
        "num_warps": tile.num_warps,
    }
    scale = h if weights.scale is None else weights.scale
    bias = h if weights.bias is None else weights.bias
    row_tiles = triton.cdiv(num_rows, block_m(num_rows))
    down_kernel[(triton.cdiv(hidden, tile.block_n), splits, row_tiles)](
        act,
        weights.weight,
        scale,
        bias,
        h,
        parts,
        h if run is None else run,
        h if neurons is None else neurons[0].flags,
        h if neurons is None else neurons[0].limits[neurons[1]],
        num_rows,
        hidden,
        inner,
        LEAVES_OUT=neurons is not None,
        IS_JOINT=neurons is not None and neurons[0].is_joint,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        STAGES=num_stages_for(tile, act),
        **shared,
    )
    if splits > 1:
        add_parts_kernel[(triton.cdiv(hidden, 64), row_tiles)](
            parts,
            scale,
            bias,
            h,
            h,
            h if run is None else run,
            num_rows,
            hidden,
            IS_RESIDUAL=True,
            HAS_BEFORE=False,
            BLOCK_N=64,
            **shared,
        )
