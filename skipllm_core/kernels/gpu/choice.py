"""Which neurons the rows of a batch leave out together: the consensus of skip/neurons.py.

k neurons go: as many as the rows that have a say would on average leave out by themselves, rounded
down; those whose score, summed over these rows, is strictly below the k-th lowest (counted from 0),
so that of equal ones none goes. That one is found by bisection over the bits of float32, which are
in the order of the numbers where these are not negative: in one program, in at most 31 rounds, and
the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from skipllm_core.kernels.gpu.down import GONE_JOINTLY, WANTED
from skipllm_core.kernels.gpu.neuron_kernels import is_voter_of
from skipllm_core.kernels.gpu.neuron_state import NeuronState
from skipllm_core.kernels.gpu.rows import DeviceRows

EXCLUDED = tl.constexpr(0x7FFFFFFF)  # above all numbers
BEYOND = tl.constexpr(0x7F800002)  # of float32, infinity has 0x7F800000


@triton.jit(do_not_specialize=["layer"])
def _choose(
    layer, scores_ptr, votes_ptr, joint_gone_ptr, flags_ptr, limits_ptr, run_ptr, counts_ptr,
    unread_ptr, num_rows, num_tiles, inner, num_layers,
    IS_SECOND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    exists = row < num_rows
    runs = tl.load(run_ptr + row, mask=exists, other=0) == 1
    is_voter = is_voter_of(limits_ptr, row, runs)
    num_voters = tl.sum(is_voter.to(tl.int32), 0)
    num_running = tl.sum(runs.to(tl.int32), 0)

    n = tl.arange(0, BLOCK)
    is_left = n < inner
    score = tl.zeros((BLOCK,), tl.float32)
    votes = tl.zeros((BLOCK,), tl.int32)
    for tile in range(num_tiles):
        score += tl.load(scores_ptr + tile * inner + n, mask=is_left, other=0.0)
        votes += tl.load(votes_ptr + tile * inner + n, mask=is_left, other=0)
    if IS_SECOND:
        is_gone = tl.load(joint_gone_ptr + n, mask=is_left, other=0) == 1
        is_left = is_left & ~is_gone
    count = tl.sum(votes, 0) // tl.maximum(num_voters, 1)

    # The highest bound below which there are no more than `count`.
    bits = tl.where(is_left, score.to(tl.int32, bitcast=True) & EXCLUDED, EXCLUDED)
    low = tl.full((), 0, tl.int32)
    high = tl.full((), BEYOND, tl.int32)
    while high - low > 1:
        middle = low + (high - low) // 2
        below = tl.sum((bits < middle).to(tl.int32), 0)
        low = tl.where(below <= count, middle, low)
        high = tl.where(below < count, high, middle)
        high = tl.where(below == count, middle + 1, high)  # these are the ones
    goes = is_left & (bits < low) & (num_voters > 0)
    num_gone = tl.sum(goes.to(tl.int32), 0)

    # Nothing of theirs is read where all rows have a say; these have told their wishes themselves.
    num_unread = tl.where(num_voters == num_running, num_gone, 0)
    at = 2 * (row * num_layers + layer)
    mine = tl.where(is_voter, num_gone, 0)
    if not IS_SECOND:
        tl.store(joint_gone_ptr + n, goes.to(tl.int8), mask=n < inner)
        tl.store(counts_ptr + at, mine, mask=exists)
        tl.store(unread_ptr + 2 * layer, num_unread)
    else:
        is_gone = is_gone | goes
        num_unread += tl.load(unread_ptr + 2 * layer)
        tl.store(counts_ptr + at + 1, mine, mask=exists)
        tl.store(unread_ptr + 2 * layer + 1, num_unread)
        jointly = tl.where(is_gone, GONE_JOINTLY, tl.where(num_voters > 0, WANTED, 0))
        for tile in range(num_tiles):
            flags = tl.load(flags_ptr + tile * inner + n, mask=n < inner, other=0).to(tl.int32)
            tl.store(flags_ptr + tile * inner + n, (flags | jointly).to(tl.int8), mask=n < inner)


def choose(
    rows: DeviceRows,
    state: NeuronState,
    run: Tensor,
    layer: int,
    num_rows: int,
    num_tiles: int,
    *,
    is_second: bool,
) -> None:
    """What the voters leave out of the layer, before up or (`is_second`) before down."""
    inner = state.gates.shape[1]
    block = triton.next_power_of_2(inner)
    _choose[(1,)](
        layer,
        state.scores,
        state.votes,
        state.joint_gone,
        state.flags,
        state.limits[layer],
        run,
        rows.neuron_counts,
        rows.unread,
        num_rows,
        num_tiles,
        inner,
        rows.num_layers,
        IS_SECOND=is_second,
        ROWS=triton.next_power_of_2(num_rows),
        BLOCK=block,
        num_warps=min(32, max(4, block // 512)),
    )
