"""Which rows run a layer's FFN, decided on the device: the rule of skip/policy.py.

    step's state, all of it int32 but the similarities
      runs          [num_layers, max_num_rows]: 1 where the row runs the layer's FFN
      triggered, num_skips, similarities [max_num_rows]: of the token, so far
      joint         [1]: whether the consensus has triggered

A row decides for itself in the kernel that projects queries, keys and values, which loads its
residual anyway; what it says is read three kernels later. Sums are taken in a fixed order and
without atomics: a row at its threshold decides alike in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipllm_core.kernels.gpu.rows import DeviceRows
from skipllm_core.skip import consensus

UNSEEN = tl.constexpr(-2.0)  # a similarity that was not measured
SHARE_ROUNDING = tl.constexpr(consensus.SHARE_ROUNDING)


class GateState(NamedTuple):
    """See the drawing above. `before` [max_num_rows, hidden] is the residual before the FFN."""

    before: Tensor
    runs: Tensor
    triggered: Tensor
    num_skips: Tensor
    similarities: Tensor
    joint: Tensor

    @classmethod
    def build(cls, rows: DeviceRows, hidden: int, dtype: torch.dtype) -> GateState:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=rows.device)

        return cls(
            before=zeros(rows.max_num_rows, hidden, dtype=dtype),
            runs=zeros(rows.num_layers, rows.max_num_rows),
            triggered=zeros(rows.max_num_rows),
            num_skips=zeros(rows.max_num_rows),
            similarities=zeros(rows.max_num_rows, dtype=torch.float32),
            joint=zeros(1),
        )


def row_settings(rows: DeviceRows) -> tuple[Tensor, ...]:
    """The first tensors of `decide_row` and `_decide_together`, in their order."""
    return (
        rows.positions,
        rows.policies,
        rows.thresholds,
        rows.skip_from,
        rows.cold_starts,
        rows.cold_ends,
        rows.max_skips,
    )


@triton.jit
def similarity(before_ptr, after_ptr, hidden, BLOCK: tl.constexpr):
    """cos(before, after) of two rows of `hidden` elements, in float32."""
    both = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden, BLOCK):
        at = start + tl.arange(0, BLOCK)
        before = tl.load(before_ptr + at, mask=at < hidden, other=0.0).to(tl.float32)
        after = tl.load(after_ptr + at, mask=at < hidden, other=0.0).to(tl.float32)
        both += before * after
        first += before * before
        second += after * after
    return tl.sum(both, 0) / (tl.sqrt(tl.sum(first, 0)) * tl.sqrt(tl.sum(second, 0)))


@triton.jit
def decide_row(
    row,
    layer,
    h_ptr,
    before_ptr,
    positions_ptr,
    policies_ptr,
    thresholds_ptr,
    skip_from_ptr,
    cold_starts_ptr,
    cold_ends_ptr,
    max_skips_ptr,
    mask_ptr,
    runs_ptr,
    triggered_ptr,
    num_skips_ptr,
    similarities_ptr,
    skipped_ptr,
    hidden,
    num_layers,
    max_num_rows,
    CONSENSUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the layer before did to the row, and whether the row runs this layer's FFN."""
    position = tl.load(positions_ptr + row)
    policy = tl.load(policies_ptr + row)  # see RowPolicy
    cold_start = tl.load(cold_starts_ptr + row)
    cold_end = tl.load(cold_ends_ptr + row)
    may_skip = (position >= 0) & (position >= tl.load(skip_from_ptr + row))
    triggered = tl.full((), 0, tl.int32)
    num_skips = tl.full((), 0, tl.int32)
    seen = tl.full((), -2.0, tl.float32)
    if layer > 0:
        triggered = tl.load(triggered_ptr + row)
        num_skips = tl.load(num_skips_ptr + row)
        last = layer - 1
        ran = tl.load(runs_ptr + last * max_num_rows + row)
        is_watched = may_skip & (policy == 1) & (ran == 1)
        # A trigger at the last skippable layer would change nothing: there is no next one.
        is_watched = is_watched & (cold_start <= last) & (last < cold_end - 1)
        if not CONSENSUS:
            is_watched = is_watched & (triggered == 0)
        if is_watched:
            seen = similarity(before_ptr + row * hidden, h_ptr + row * hidden, hidden, BLOCK)
            triggered = triggered | (seen >= tl.load(thresholds_ptr + row)).to(tl.int32)
    tl.store(triggered_ptr + row, triggered)
    tl.store(similarities_ptr + row, seen)
    skips = (policy == 2) & (tl.load(mask_ptr + row * num_layers + layer) == 1)
    if not CONSENSUS:
        is_in_region = (cold_start <= layer) & (layer < cold_end)
        has_left = num_skips < tl.load(max_skips_ptr + row)
        skips = skips | ((policy == 1) & (triggered == 1) & is_in_region & has_left)
    skips = (skips & may_skip).to(tl.int32)
    tl.store(num_skips_ptr + row, num_skips + skips)
    tl.store(skipped_ptr + row * num_layers + layer, skips)
    tl.store(runs_ptr + layer * max_num_rows + row, (position >= 0).to(tl.int32) - skips)


@triton.jit(do_not_specialize=["layer"])
def _decide_together(
    layer,
    positions_ptr,
    policies_ptr,
    thresholds_ptr,
    skip_from_ptr,
    cold_starts_ptr,
    cold_ends_ptr,
    max_skips_ptr,
    consensus_ptr,
    runs_ptr,
    triggered_ptr,
    num_skips_ptr,
    similarities_ptr,
    joint_ptr,
    skipped_ptr,
    num_rows,
    num_layers,
    max_num_rows,
    ROWS: tl.constexpr,
):
    """After `decide_row` of all rows: those of policy FFN_SKIP that may skip do so together."""
    row = tl.arange(0, ROWS)
    exists = row < num_rows
    position = tl.load(positions_ptr + row, mask=exists, other=-1)
    policy = tl.load(policies_ptr + row, mask=exists, other=0)
    skip_from = tl.load(skip_from_ptr + row, mask=exists, other=0)
    cold_start = tl.load(cold_starts_ptr + row, mask=exists, other=0)
    cold_end = tl.load(cold_ends_ptr + row, mask=exists, other=0)
    max_skips = tl.load(max_skips_ptr + row, mask=exists, other=0)
    threshold = tl.load(thresholds_ptr + row, mask=exists, other=2.0)
    seen = tl.load(similarities_ptr + row, mask=exists, other=UNSEEN)
    triggered = tl.load(triggered_ptr + row, mask=exists, other=0)
    num_skips = tl.load(num_skips_ptr + row, mask=exists, other=0)
    share = tl.load(consensus_ptr)
    slack = tl.load(consensus_ptr + 1)
    joint = tl.full((), 0, tl.int32)
    if layer > 0:
        joint = tl.load(joint_ptr)
    votes = (position >= 0) & (policy == 1) & (position >= skip_from)
    num_votes = tl.sum(votes.to(tl.int32), 0)
    num_for = tl.sum((votes & (triggered == 1)).to(tl.int32), 0)
    num_far = tl.sum((votes & ~(seen >= threshold - slack)).to(tl.int32), 0)
    is_reached = (num_votes > 0) & (num_far == 0) & (num_for >= share * num_votes - SHARE_ROUNDING)
    joint = tl.where(is_reached, 1, joint)
    tl.store(joint_ptr, joint)
    is_in_region = (cold_start <= layer) & (layer < cold_end)
    skips = votes & (joint == 1) & is_in_region & (num_skips < max_skips)
    skips = skips.to(tl.int32)
    tl.store(num_skips_ptr + row, num_skips + skips, mask=votes)
    tl.store(skipped_ptr + row * num_layers + layer, skips, mask=votes)
    tl.store(runs_ptr + layer * max_num_rows + row, 1 - skips, mask=votes)


def decide_together(rows: DeviceRows, state: GateState, layer: int, num_rows: int) -> None:
    """The consensus rule (skip/consensus.py) for this layer, after the rows' own part."""
    _decide_together[(1,)](
        layer,
        *row_settings(rows),
        rows.consensus,
        state.runs,
        state.triggered,
        state.num_skips,
        state.similarities,
        state.joint,
        rows.skipped,
        num_rows,
        rows.num_layers,
        rows.max_num_rows,
        ROWS=triton.next_power_of_2(num_rows),
        num_warps=1,
    )


@triton.jit
def _tell_stock(
    positions_ptr, skipped_ptr, num_needed_ptr, num_rows, num_layers,
    ROWS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    row = tl.arange(0, ROWS)
    position = tl.load(positions_ptr + row, mask=row < num_rows, other=-1)
    zeros = tl.zeros((ROWS,), tl.int32)
    tl.store(skipped_ptr + row * num_layers + layer, zeros, mask=row < num_rows)
    tl.store(num_needed_ptr + layer, tl.sum((position >= 0).to(tl.int32), 0))


@triton.jit
def _tell(runs_ptr, num_needed_ptr, num_rows, max_num_rows, ROWS: tl.constexpr):
    layer = tl.program_id(0)
    row = tl.arange(0, ROWS)
    runs = tl.load(runs_ptr + layer * max_num_rows + row, mask=row < num_rows, other=0)
    tl.store(num_needed_ptr + layer, tl.sum(runs, 0))


def tell(rows: DeviceRows, state: GateState, num_rows: int, *, can_skip: bool) -> None:
    """Fills `rows.num_needed` and, where nothing could skip, `rows.skipped`."""
    size = triton.next_power_of_2(num_rows)
    grid = (rows.num_layers,)
    if can_skip:
        _tell[grid](
            state.runs, rows.num_needed, num_rows, rows.max_num_rows, ROWS=size, num_warps=1
        )
    else:
        _tell_stock[grid](
            rows.positions, rows.skipped, rows.num_needed, num_rows, rows.num_layers,
            ROWS=size, num_warps=1,
        )  # fmt: skip
