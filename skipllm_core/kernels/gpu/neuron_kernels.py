"""The kernels of neurons.py: which neurons a row leaves out, and what the others come to.

    alone      DOES_GATE and DOES_UP: gates, the first test, up of what some row wants, the second
    together   DOES_GATE, a choice, DOES_UP, a choice        (choice.py), which need all neurons

A neuron that no row wants is masked off: nobody asks for its weights. A program's steps are as many
as ever, and bring less; so several of them are on their way at a time (STAGES).
"""

from __future__ import annotations

import triton
import triton.language as tl

from skipllm_core.kernels.gpu.linear_kernels import dot_tile, gemv_tile, inverse_rms, silu


@triton.jit
def limit_kernel(
    positions_ptr, policies_ptr, skip_from_ptr, thresholds_ptr, limits_ptr,
    num_rows, num_layers, num_padded, ROWS: tl.constexpr,
):  # fmt: skip
    """The thresholds of the rows that are under the rule in this step; 0 of the others."""
    layer = tl.program_id(0)
    row = tl.arange(0, ROWS)
    exists = row < num_rows
    position = tl.load(positions_ptr + row, mask=exists, other=-1)
    policy = tl.load(policies_ptr + row, mask=exists, other=0)
    skip_from = tl.load(skip_from_ptr + row, mask=exists, other=0)
    has_rule = (position >= 0) & (policy == 3) & (position >= skip_from)  # see RowPolicy
    at = 2 * (row * num_layers + layer)
    to = 2 * (layer * num_padded + row)
    up = tl.load(thresholds_ptr + at, mask=has_rule, other=0.0)
    down = tl.load(thresholds_ptr + at + 1, mask=has_rule, other=0.0)
    tl.store(limits_ptr + to, up, mask=exists)
    tl.store(limits_ptr + to + 1, down, mask=exists)


@triton.jit
def is_voter_of(limits_ptr, m, runs):
    """Rows that have a rule in this layer."""
    before_up = tl.load(limits_ptr + 2 * m, mask=runs, other=0.0)
    before_down = tl.load(limits_ptr + 2 * m + 1, mask=runs, other=0.0)
    return (before_up > 0) | (before_down > 0)


@triton.jit
def _factors(
    x_ptr, factors_ptr, m, exists, K, eps,
    DOES_GATE: tl.constexpr, KEEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of the norm of the rows, which the launch for gates keeps for the one for up."""
    if BLOCK_M == 1:
        return eps  # not looked at: one row is normed along the way
    elif DOES_GATE:
        factors = inverse_rms(x_ptr, m, exists, K, eps, BLOCK_M, BLOCK_K)
        if KEEPS:
            if tl.program_id(0) == 0:
                tl.store(factors_ptr + m, factors, mask=exists)
        return factors
    else:
        return tl.load(factors_ptr + m, mask=exists, other=0.0)


@triton.jit
def _sums(
    x_ptr, norm_ptr, w_ptr, m, exists, n, is_wanted, K, eps, factors,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of the normed rows; 0 of what is not wanted, which is not read."""
    if BLOCK_M == 1:
        sums, squares = gemv_tile(
            x_ptr, norm_ptr, w_ptr, n, is_wanted, 0, K, K, True, BLOCK_N, BLOCK_K, STAGES
        )
        sums *= 1.0 / tl.sqrt(squares / K + eps)
        return sums[None, :]
    else:
        return dot_tile(
            x_ptr, norm_ptr, w_ptr, m, exists, n, is_wanted, 0, K, K, factors,
            True, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _scaled(
    sums, scale_ptr, bias_ptr, n, is_wanted, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr
):
    if HAS_SCALE:
        sums *= tl.load(scale_ptr + n, mask=is_wanted, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n, mask=is_wanted, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def neurons_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, bias_ptr, down_norms_ptr, gates_ptr, out_ptr,
    run_ptr, limits_ptr, flags_ptr, gone_ptr, scores_ptr, votes_ptr, joint_gone_ptr,
    factors_ptr, num_rows, inner, K, eps,
    DOES_GATE: tl.constexpr, DOES_UP: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    IS_JOINT: tl.constexpr = not (DOES_GATE and DOES_UP)
    tile = tl.program_id(1)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = m < num_rows
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_neuron = n < inner
    of_tile = tile * inner + n
    runs = tl.load(run_ptr + m, mask=exists, other=0) == 1
    if tl.max(runs.to(tl.int32), 0) == 0:
        if IS_JOINT:  # other tiles may have a choice to make
            tl.store(scores_ptr + of_tile, tl.zeros((BLOCK_N,), tl.float32), mask=is_neuron)
            tl.store(votes_ptr + of_tile, tl.zeros((BLOCK_N,), tl.int32), mask=is_neuron)
        return
    before_up = tl.load(limits_ptr + 2 * m, mask=runs, other=0.0)
    before_down = tl.load(limits_ptr + 2 * m + 1, mask=runs, other=0.0)
    is_voter = is_voter_of(limits_ptr, m, runs)[:, None]
    length = tl.load(down_norms_ptr + n, mask=is_neuron, other=0.0)[None, :]
    at = m[:, None] * inner + n[None, :]
    is_value = exists[:, None] & is_neuron[None, :]
    dtype = out_ptr.dtype.element_ty
    factors = _factors(x_ptr, factors_ptr, m, exists, K, eps, DOES_GATE, IS_JOINT, BLOCK_M, BLOCK_K)

    if DOES_GATE:
        gate = _sums(
            x_ptr, norm_ptr, w_ptr, m, exists, n, is_neuron, K, eps, factors,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        gate = _scaled(gate, scale_ptr, bias_ptr, n, is_neuron, HAS_SCALE, HAS_BIAS)
        gate = silu(gate, dtype)
        score = tl.abs(gate) * length
        is_gone = score < before_up[:, None]  # not so what is no number
        if not DOES_UP:
            tl.store(gates_ptr + at, gate.to(dtype), mask=is_value)
    else:
        gate = tl.load(gates_ptr + at, mask=is_value, other=0.0).to(tl.float32)
        jointly = tl.load(joint_gone_ptr + n, mask=is_neuron, other=0) == 1
        is_gone = is_voter & jointly[None, :]

    if DOES_UP:
        is_kept = runs[:, None] & is_neuron[None, :] & ~is_gone
        is_wanted = tl.max(is_kept.to(tl.int32), 0) == 1
        up = _sums(
            x_ptr, norm_ptr, w_ptr, m, exists, n + inner, is_wanted, K, eps, factors,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        up = _scaled(up, scale_ptr, bias_ptr, n + inner, is_wanted, HAS_SCALE, HAS_BIAS)
        product = (gate * up.to(dtype).to(tl.float32)).to(dtype)
        score = tl.abs(product.to(tl.float32)) * length
        is_low = ~is_gone & (score < before_down[:, None])
        stays = is_kept
        if IS_JOINT:
            is_kept = is_kept & ~is_voter  # of the voters, the choice will say
        else:
            is_kept = is_kept & ~is_low
            stays = is_kept
            gone = tl.where(is_gone, 1, is_low.to(tl.int32) * 2)
            tl.store(gone_ptr + at, gone.to(tl.int8), mask=is_value)
        tl.store(out_ptr + at, tl.where(stays, product, 0.0), mask=is_value)
        flags = tl.max(is_kept.to(tl.int32), 0)
        tl.store(flags_ptr + of_tile, flags.to(tl.int8), mask=is_neuron)
    else:
        is_low = is_gone

    if IS_JOINT:
        is_low = is_low & is_voter
        score = tl.where(is_voter, score, 0.0)
        tl.store(scores_ptr + of_tile, tl.sum(score * score, 0), mask=is_neuron)
        tl.store(votes_ptr + of_tile, tl.sum(is_low.to(tl.int32), 0), mask=is_neuron)


@triton.jit
def count_kernel(
    runs_ptr, gone_ptr, counts_ptr, unread_ptr, num_rows, max_num_rows, inner, num_layers,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a layer: what each row left out before up and before down, and what no row wanted."""
    layer = tl.program_id(0)
    row = tl.arange(0, ROWS)
    exists = row < num_rows
    runs = tl.load(runs_ptr + layer * max_num_rows + row, mask=exists, other=0) == 1
    before_up = tl.zeros((ROWS,), tl.int32)
    before_down = tl.zeros((ROWS,), tl.int32)
    no_up = tl.zeros((BLOCK,), tl.int32)
    no_down = tl.zeros((BLOCK,), tl.int32)
    first = (layer.to(tl.int64) * max_num_rows + row) * inner
    for start in range(0, inner, BLOCK):
        n = start + tl.arange(0, BLOCK)
        mask = runs[:, None] & (n < inner)[None, :]
        gone = tl.load(gone_ptr + first[:, None] + n[None, :], mask=mask, other=0).to(tl.int32)
        before_up += tl.sum((gone == 1).to(tl.int32), 1)
        before_down += tl.sum((gone == 2).to(tl.int32), 1)
        no_up += tl.min(tl.where(runs[:, None], (gone == 1).to(tl.int32), 1), 0)
        no_down += tl.min(tl.where(runs[:, None], (gone > 0).to(tl.int32), 1), 0)
        # Beyond the last neuron `gone` is 0, so nothing is counted there.
    at = 2 * (row * num_layers + layer)
    tl.store(counts_ptr + at, before_up, mask=exists)
    tl.store(counts_ptr + at + 1, before_down, mask=exists)
    does_any_run = tl.max(runs.to(tl.int32), 0)
    tl.store(unread_ptr + 2 * layer, tl.sum(no_up, 0) * does_any_run)
    tl.store(unread_ptr + 2 * layer + 1, tl.sum(no_down, 0) * does_any_run)
