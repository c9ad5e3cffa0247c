"""The kernels of linear.py.

One row: products element by element, a program per BLOCK_N outputs. More: `tl.dot` over the rows,
padded to 16; of more than 64 rows every tile of 64 reads the weights. With SPLITS > 1 the inputs
are divided among programs, whose sums `add_parts_kernel` adds in a fixed order. A predicated kernel
whose rows all skip loads its flags, and returns before it has touched a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skipllm_core.kernels.gpu.gate import decide_row


@triton.jit
def gemv_tile(
    x_ptr, norm_ptr, w_ptr, n, is_output, first, end, K,
    HAS_NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """Sums [BLOCK_N] of one row over inputs first .. end - 1, and the sum of the row's squares.

    Of outputs that are none nothing is read. STAGES: weights so many steps ahead are on their way.
    """
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(first, end, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        is_input = k < end
        x = tl.load(x_ptr + k, mask=is_input, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x *= tl.load(norm_ptr + k, mask=is_input, other=0.0).to(tl.float32)
        w = tl.load(
            w_ptr + n[:, None] * K + k[None, :],
            mask=is_output[:, None] & is_input[None, :],
            other=0.0,
            eviction_policy="evict_first",  # every weight is read once a step
        )
        sums += w.to(tl.float32) * x[None, :]
    return tl.sum(sums, 1), tl.sum(squares, 0)


@triton.jit
def inverse_rms(x_ptr, m, is_row, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of rows m: [BLOCK_M]."""
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = m[:, None] * K + k[None, :]
        x = tl.load(x_ptr + at, mask=is_row[:, None] & (k < K)[None, :], other=0.0)
        squares += x.to(tl.float32) * x.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(squares, 1) / K + eps)


@triton.jit
def dot_tile(
    x_ptr, norm_ptr, w_ptr, m, is_row, n, is_output, first, end, K, factors,
    HAS_NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_M, BLOCK_N] of rows m over inputs first .. end - 1; with a norm, of the rows
    normed by the `factors` that `inverse_rms` gives."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_input = k < end
        at = m[:, None] * K + k[None, :]
        x = tl.load(x_ptr + at, mask=is_row[:, None] & is_input[None, :], other=0.0)
        if HAS_NORM:
            normed = (x.to(tl.float32) * factors[:, None]).to(x.dtype).to(tl.float32)
            weight = tl.load(norm_ptr + k, mask=is_input, other=0.0).to(tl.float32)
            x = (normed * weight[None, :]).to(x.dtype)
        w = tl.load(
            w_ptr + n[None, :] * K + k[:, None],
            mask=is_output[None, :] & is_input[:, None],
            other=0.0,
            eviction_policy="evict_first",
        )
        sums = tl.dot(x, w.to(x.dtype), sums, input_precision="ieee")
    return sums


@triton.jit
def tile_sums(
    x_ptr, norm_ptr, w_ptr, m, is_row, n, is_output, first, end, K, eps,
    HAS_NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_M, BLOCK_N]; with a norm, of all inputs at once (no splits)."""
    if BLOCK_M == 1:
        sums, squares = gemv_tile(
            x_ptr, norm_ptr, w_ptr, n, is_output, first, end, K, HAS_NORM, BLOCK_N, BLOCK_K
        )
        if HAS_NORM:
            sums *= 1.0 / tl.sqrt(squares / K + eps)
        return sums[None, :]
    else:
        factors = eps  # not looked at
        if HAS_NORM:
            factors = inverse_rms(x_ptr, m, is_row, K, eps, BLOCK_M, BLOCK_K)
        return dot_tile(
            x_ptr, norm_ptr, w_ptr, m, is_row, n, is_output, first, end, K, factors,
            HAS_NORM, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def finish(
    sums, out_ptr, before_ptr, scale_ptr, bias_ptr, m, n, keep, is_output, N,
    IS_RESIDUAL: tl.constexpr, HAS_BEFORE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Scales, bias, residual, and where they are kept: rows `keep` of `out`, and of `before`."""
    if HAS_SCALE:
        sums *= tl.load(scale_ptr + n, mask=is_output, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n, mask=is_output, other=0.0).to(tl.float32)[None, :]
    at = m[:, None] * N + n[None, :]
    mask = keep[:, None] & is_output[None, :]
    values = sums.to(out_ptr.dtype.element_ty)
    if IS_RESIDUAL:
        old = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        values = (old + values.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, values, mask=mask)
    if HAS_BEFORE:
        tl.store(before_ptr + at, values, mask=mask)


@triton.jit(do_not_specialize=["layer"])  # or layer 1, and every 16th, is compiled again
def linear_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, before_ptr, parts_ptr, run_ptr,
    num_rows, N, K, eps,
    layer, positions_ptr, policies_ptr, thresholds_ptr, skip_from_ptr, cold_starts_ptr,
    cold_ends_ptr, max_skips_ptr, mask_ptr, runs_ptr, triggered_ptr, num_skips_ptr,
    similarities_ptr, skipped_ptr, num_layers, max_num_rows,
    HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_RESIDUAL: tl.constexpr, HAS_BEFORE: tl.constexpr, IS_PREDICATED: tl.constexpr,
    DECIDES: tl.constexpr, CONSENSUS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = m < num_rows
    if IS_PREDICATED:
        runs = tl.load(run_ptr + m, mask=keep, other=0)
        if tl.max(runs, 0) == 0:
            return
        keep = keep & (runs == 1)
    if DECIDES:
        if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
            for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
                decide_row(
                    row, layer, x_ptr, before_ptr, positions_ptr, policies_ptr, thresholds_ptr,
                    skip_from_ptr, cold_starts_ptr, cold_ends_ptr, max_skips_ptr, mask_ptr,
                    runs_ptr, triggered_ptr, num_skips_ptr, similarities_ptr, skipped_ptr,
                    K, num_layers, max_num_rows, CONSENSUS, BLOCK_K,
                )  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = n < N
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    first = tl.program_id(1) * steps * BLOCK_K
    end = tl.minimum(first + steps * BLOCK_K, K)
    sums = tile_sums(
        x_ptr, norm_ptr, w_ptr, m, m < num_rows, n, is_output, first, end, K, eps,
        HAS_NORM, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLITS == 1:
        finish(
            sums, out_ptr, before_ptr, scale_ptr, bias_ptr, m, n, keep, is_output, N,
            IS_RESIDUAL, HAS_BEFORE, HAS_SCALE, HAS_BIAS,
        )  # fmt: skip
    else:
        at = (tl.program_id(1) * num_rows + m[:, None]) * N + n[None, :]
        tl.store(parts_ptr + at, sums, mask=keep[:, None] & is_output[None, :])


@triton.jit
def add_parts_kernel(
    parts_ptr, scale_ptr, bias_ptr, out_ptr, before_ptr, run_ptr, num_rows, N,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_RESIDUAL: tl.constexpr,
    HAS_BEFORE: tl.constexpr, IS_PREDICATED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = m < num_rows
    if IS_PREDICATED:
        runs = tl.load(run_ptr + m, mask=keep, other=0)
        if tl.max(runs, 0) == 0:
            return
        keep = keep & (runs == 1)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = n < N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in range(SPLITS):
        at = (split * num_rows + m[:, None]) * N + n[None, :]
        sums += tl.load(parts_ptr + at, mask=keep[:, None] & is_output[None, :], other=0.0)
    finish(
        sums, out_ptr, before_ptr, scale_ptr, bias_ptr, m, n, keep, is_output, N,
        IS_RESIDUAL, HAS_BEFORE, HAS_SCALE, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def silu(x, dtype: tl.constexpr):
    """In float32, of and to what `dtype` can hold."""
    x = x.to(dtype).to(tl.float32)
    return (x / (1.0 + tl.exp(-x))).to(dtype).to(tl.float32)


@triton.jit
def gate_up_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, run_ptr, num_rows, inner, K, eps,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_PREDICATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = m < num_rows
    if IS_PREDICATED:
        if tl.max(tl.load(run_ptr + m, mask=is_row, other=0), 0) == 0:
            return
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = n < inner
    gate = tile_sums(
        x_ptr, norm_ptr, w_ptr, m, is_row, n, is_output, 0, K, K, eps,
        True, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    up = tile_sums(
        x_ptr, norm_ptr, w_ptr, m, is_row, n + inner, is_output, 0, K, K, eps,
        True, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_SCALE:
        gate *= tl.load(scale_ptr + n, mask=is_output, other=0.0)[None, :]
        up *= tl.load(scale_ptr + inner + n, mask=is_output, other=0.0)[None, :]
    if HAS_BIAS:
        gate += tl.load(bias_ptr + n, mask=is_output, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + inner + n, mask=is_output, other=0.0).to(tl.float32)[None, :]
    dtype = out_ptr.dtype.element_ty
    act = (silu(gate, dtype) * up.to(dtype).to(tl.float32)).to(dtype)
    mask = is_row[:, None] & is_output[None, :]
    tl.store(out_ptr + m[:, None] * inner + n[None, :], act, mask=mask)
