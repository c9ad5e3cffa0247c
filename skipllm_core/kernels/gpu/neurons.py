"""A layer's neurons left out row by row, on the device: the rule of skip/neurons.py.

    launches of a layer                          reads                    writes
    gates, first test, up, second test           h, limits                act, flags, gone
    down (down.py), over what some row wants     act, flags               h

Under `--skip-batch consensus` the rows choose between the gates and up, and again before down, each
time in a launch of its own, since the choice is over all neurons of the layer.
"""

from __future__ import annotations

from dataclasses import replace

import triton
from torch import Tensor

from skipllm_core.kernels.gpu.choice import choose
from skipllm_core.kernels.gpu.linear import Tile, Tiles, block_m, num_stages_for, tile_for
from skipllm_core.kernels.gpu.neuron_kernels import count_kernel, limit_kernel, neurons_kernel
from skipllm_core.kernels.gpu.neuron_state import NeuronState
from skipllm_core.kernels.gpu.rows import DeviceRows
from skipllm_core.model.llama import Block

COUNTED_AT_ONCE = 4096  # neurons times rows


def neuron_tile_for(num_rows: int, num_outputs: int, num_inputs: int) -> Tile:
    """The tile for a shape: heuristics, not yet swept on a device."""
    tile = tile_for(num_rows, num_outputs, num_inputs)
    if num_rows > 1:
        return tile
    # Up waits for the gates: shorter steps, so that more programs have room beside each other.
    return replace(tile, block_k=min(512, tile.block_k), num_stages=5)


def limit(rows: DeviceRows, state: NeuronState, num_rows: int) -> None:
    """Finds the thresholds of this step, for all layers."""
    limit_kernel[(rows.num_layers,)](
        rows.positions,
        rows.policies,
        rows.skip_from,
        rows.neuron_thresholds,
        state.limits,
        num_rows,
        rows.num_layers,
        state.limits.shape[1],
        ROWS=triton.next_power_of_2(num_rows),
        num_warps=1,
    )


def leave_out(
    h: Tensor,
    block: Block,
    act: Tensor,
    rows: DeviceRows,
    state: NeuronState,
    run: Tensor,
    layer: int,
    num_rows: int,
    *,
    tiles: Tiles = neuron_tile_for,
) -> None:
    """act[:num_rows] = silu(W_gate norm(h)) * W_up norm(h), 0 for what a row leaves out, and the
    flags that `down` reads. h [max_num_rows, hidden], act [max_num_rows, inner]."""
    weights, norm = block.ffn.gate_up, block.norm2
    num_outputs, hidden = weights.weight.shape
    inner = num_outputs // 2
    tile = tiles(num_rows, inner, hidden)
    row_tiles = triton.cdiv(num_rows, block_m(num_rows))
    # In the order of the launches: what each does.
    parts = ((True, False), (False, True)) if state.is_joint else ((True, True),)
    for does_gate, does_up in parts:
        neurons_kernel[(triton.cdiv(inner, tile.block_n), row_tiles)](
            h,
            norm.weight,
            weights.weight,
            act if weights.scale is None else weights.scale,
            act if weights.bias is None else weights.bias,
            block.ffn.down_norms,
            state.gates,
            act,
            run,
            state.limits[layer],
            state.flags,
            state.gone[layer],
            state.scores,
            state.votes,
            state.joint_gone,
            state.factors,
            num_rows,
            inner,
            hidden,
            norm.eps,
            DOES_GATE=does_gate,
            DOES_UP=does_up,
            HAS_SCALE=weights.scale is not None,
            HAS_BIAS=weights.bias is not None,
            BLOCK_M=block_m(num_rows),
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            STAGES=num_stages_for(tile, h),  # of one row; of more, `num_stages`
            num_warps=tile.num_warps,
            num_stages=num_stages_for(tile, h),
        )
        if state.is_joint:
            choose(rows, state, run, layer, num_rows, row_tiles, is_second=does_up)


def tell_neurons(rows: DeviceRows, state: NeuronState, runs: Tensor, num_rows: int) -> None:
    """Fills `rows.neuron_counts` and `rows.unread`, which the consensus has done already."""
    if state.is_joint:
        return
    size = triton.next_power_of_2(num_rows)
    count_kernel[(rows.num_layers,)](
        runs,
        state.gone,
        rows.neuron_counts,
        rows.unread,
        num_rows,
        rows.max_num_rows,
        state.gone.shape[2],
        rows.num_layers,
        ROWS=size,
        BLOCK=max(16, COUNTED_AT_ONCE // size),
        num_warps=4,
    )
