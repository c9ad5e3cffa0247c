"""Linears over a few rows, with what stands before and after them in a layer.

    y = x W^T (+ bias), W [num_outputs, num_inputs] in any of bf16, fp16, fp32, or int8 and fp8 with
    one scale per output, which are widened in registers (W8A16). Sums in fp32.

The norm of the inputs (RMSNorm) is taken along; the residual is updated where it lies, so that a
kernel whose rows all skip has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from skipllm_core.kernels.gpu.gate import GateState, row_settings
from skipllm_core.kernels.gpu.linear_kernels import (
    add_parts_kernel,
    gate_up_kernel,
    linear_kernel,
)
from skipllm_core.kernels.gpu.rows import DeviceRows
from skipllm_core.model.layers import Linear, RMSNorm


@dataclass(frozen=True, slots=True)
class Tile:
    """How a linear is cut into programs. To be swept on a device; see `tile_for`."""

    block_n: int  # outputs of a program
    block_k: int  # inputs of a step of its loop
    splits: int = 1  # of the inputs
    num_warps: int = 4
    num_stages: int = 3


Tiles = Callable[[int, int, int], Tile]  # of num_rows, num_outputs, num_inputs

MAX_BLOCK_M = 64
MAX_SPLITS = 32  # of one row; of more, 8
NUM_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200: enough loads in flight


def tile_for(num_rows: int, num_outputs: int, num_inputs: int) -> Tile:
    """The tile for a shape: heuristics, not yet swept on a device."""
    if num_rows == 1:
        block_k = min(1024, max(16, triton.next_power_of_2(num_inputs)))
        block_n = 8 if num_outputs >= 8 * NUM_PROGRAMS else 4
        num_stages = 3
    else:
        block_k = min(128, max(16, triton.next_power_of_2(num_inputs)))
        block_n = 32 if num_outputs >= 32 * NUM_PROGRAMS else 16
        num_stages = 4
    programs = -(-num_outputs // block_n)
    most = max(1, num_inputs // (4 * block_k))  # a program has four steps at least
    splits = min(8, most, max(1, NUM_PROGRAMS // programs))
    return Tile(block_n, block_k, splits, num_stages=num_stages)


def block_m(num_rows: int) -> int:
    """Rows of a `tl.dot`, which has 16 at least; 1: no `tl.dot`. Its tiles of 128 rows and more
    spill registers, and do not fit into an H100's shared memory."""
    return 1 if num_rows == 1 else min(MAX_BLOCK_M, max(16, triton.next_power_of_2(num_rows)))


def linear(
    x: Tensor,
    weights: Linear,
    out: Tensor,
    num_rows: int,
    *,
    norm: RMSNorm | None = None,
    is_residual: bool = False,
    before: Tensor | None = None,
    run: Tensor | None = None,
    parts: Tensor | None = None,
    decides: tuple[DeviceRows, GateState, int] | None = None,
    consensus: bool = False,
    tiles: Tiles = tile_for,
) -> None:
    """out[:num_rows] = x W^T, or += with `is_residual`; see the module.

    x [max_num_rows, num_inputs] and out [max_num_rows, num_outputs] are contiguous. `norm`: of x.
    `before` gets what `out` got. `run` [max_num_rows] int32: rows that are 0 keep their `out`, and
    where all are, no weight is read. `parts`: float32 scratch for the splits; None: no splits.
    `decides` (rows, state, layer): the gate's part for this layer is done along the way.
    """
    assert weights.weight.is_contiguous(), "output by output; down.py has the other one"
    num_outputs, num_inputs = weights.weight.shape
    tile = tiles(num_rows, num_outputs, num_inputs)
    splits = tile.splits
    if norm is not None or parts is None or splits * num_rows * num_outputs > parts.numel():
        splits = 1
    shared = {
        "HAS_SCALE": weights.scale is not None,
        "HAS_BIAS": weights.bias is not None,
        "IS_RESIDUAL": is_residual,
        "HAS_BEFORE": before is not None and decides is None,
        "IS_PREDICATED": run is not None,
        "SPLITS": splits,
        "BLOCK_M": block_m(num_rows),
        "num_warps": tile.num_warps,
    }
    if decides is None:
        gate: tuple[Tensor | int, ...] = (0, *[out] * 13, 1, 1)  # not looked at
    else:
        rows, state, layer = decides
        assert norm is not None, "the gate looks at the residual"
        before = state.before
        gate = (
            layer,
            *row_settings(rows),
            rows.mask,
            state.runs,
            state.triggered,
            state.num_skips,
            state.similarities,
            rows.skipped,
            rows.num_layers,
            rows.max_num_rows,
        )
    row_tiles = triton.cdiv(num_rows, block_m(num_rows))
    linear_kernel[(triton.cdiv(num_outputs, tile.block_n), splits, row_tiles)](
        x,
        out if norm is None else norm.weight,
        weights.weight,
        out if weights.scale is None else weights.scale,
        out if weights.bias is None else weights.bias,
        out,
        out if before is None else before,
        out if parts is None else parts,
        out if run is None else run,
        num_rows,
        num_outputs,
        num_inputs,
        0.0 if norm is None else norm.eps,
        *gate,
        HAS_NORM=norm is not None,
        DECIDES=decides is not None,
        CONSENSUS=consensus,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_stages=num_stages_for(tile, x),
        **shared,
    )
    if splits > 1:
        add_parts_kernel[(triton.cdiv(num_outputs, 64), row_tiles)](
            parts,
            out if weights.scale is None else weights.scale,
            out if weights.bias is None else weights.bias,
            out,
            out if before is None else before,
            out if run is None else run,
            num_rows,
            num_outputs,
            BLOCK_N=64,
            **shared,
        )


def gate_up(
    h: Tensor,
    norm: RMSNorm,
    weights: Linear,
    act: Tensor,
    num_rows: int,
    *,
    run: Tensor | None = None,
    tiles: Tiles = tile_for,
) -> None:
    """act[:num_rows] = silu(W_gate norm(h)) * W_up norm(h); h [max_num_rows, hidden], act
    [max_num_rows, inner]. `run` as for `linear`: where no row runs, `act` stays as it is."""
    num_outputs, hidden = weights.weight.shape
    inner = num_outputs // 2
    tile = tiles(num_rows, inner, hidden)
    row_tiles = triton.cdiv(num_rows, block_m(num_rows))
    gate_up_kernel[(triton.cdiv(inner, tile.block_n), row_tiles)](
        h,
        norm.weight,
        weights.weight,
        act if weights.scale is None else weights.scale,
        act if weights.bias is None else weights.bias,
        act,
        act if run is None else run,
        num_rows,
        inner,
        hidden,
        norm.eps,
        HAS_SCALE=weights.scale is not None,
        HAS_BIAS=weights.bias is not None,
        IS_PREDICATED=run is not None,
        BLOCK_M=block_m(num_rows),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=num_stages_for(tile, h),
    )


def num_stages_for(tile: Tile, x: Tensor) -> int:
    """Tiles are made for 2 bytes an element: with 4, as many bytes wait in shared memory."""
    return max(2, tile.num_stages * 2 // x.itemsize)


def parts_for(num_rows: int, num_outputs: int, device: torch.device) -> Tensor:
    """Scratch for as many splits as `tile_for` and `down_tile_for` may ask for."""
    size = max(MAX_SPLITS, 8 * num_rows) * num_outputs
    return torch.zeros(size, dtype=torch.float32, device=device)
