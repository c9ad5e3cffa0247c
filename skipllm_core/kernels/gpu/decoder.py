"""The whole decode step as kernel launches that a CUDA graph can capture.

    a layer, launches                     reads                      writes
    1 norm, qkv, the gate's decision      h, before                  qkv, runs[layer]
    2 rotation, K/V, attention            qkv, cache                 cache, partial
    3 merge of the splits                 partial                    mixed
    4 o, residual                         mixed                      h, before
    5 norm, gate_up, SwiGLU    predicated h                          act
    6 down, residual           predicated act                        h

and one more where the inputs of o or down are split. Where rows leave out neurons, neurons.py has
the fifth. Nothing waits for the device and nothing is allocated, so a step is the same launches
whatever the rows are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from skipllm_core.kernels.gpu.attention import AttentionScratch, attend
from skipllm_core.kernels.gpu.down import down, down_tile_for
from skipllm_core.kernels.gpu.gate import GateState, decide_together, tell
from skipllm_core.kernels.gpu.linear import Tiles, gate_up, linear, parts_for, tile_for
from skipllm_core.kernels.gpu.neuron_state import NeuronState
from skipllm_core.kernels.gpu.neurons import leave_out, limit, neuron_tile_for, tell_neurons
from skipllm_core.kernels.gpu.rows import DeviceRows, Variant
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.llama import Block, LlamaModel

MIN_SPLIT = 64  # positions of a split of attention, at least


@triton.jit
def _embed(token_ids_ptr, embedding_ptr, h_ptr, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token_id = tl.load(token_ids_ptr + row).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(embedding_ptr + token_id * hidden + at, mask=at < hidden)
    tl.store(h_ptr + row * hidden + at, x, mask=at < hidden)


class GpuDecoder:
    """Decode steps over `rows`, for a model and cache on a CUDA device.

    (Or on the CPU, in Triton's interpreter.) `consensus`: rows skip together, see
    skip/consensus.py, with the numbers of `rows.consensus`, and leave out neurons together.
    The tiles say how linears are cut; `min_split`: the positions of attention that a program has
    at least.
    """

    def __init__(
        self,
        model: LlamaModel,
        kv_cache: KVCache,
        rows: DeviceRows,
        *,
        consensus: bool = False,
        tiles: Tiles = tile_for,
        down_tiles: Tiles = down_tile_for,
        neuron_tiles: Tiles = neuron_tile_for,
        min_split: int = MIN_SPLIT,
    ) -> None:
        config, device = model.config, rows.device
        self._model = model
        self._cache = kv_cache
        self._rows = rows
        self._consensus = consensus
        self._tiles, self._down_tiles, self._neuron_tiles = tiles, down_tiles, neuron_tiles
        dtype = model.embedding.dtype

        def buffer(width: int) -> torch.Tensor:
            return torch.zeros(rows.max_num_rows, width, dtype=dtype, device=device)

        num_heads = config.num_heads + 2 * config.num_kv_heads
        self._h = buffer(config.hidden_size)
        self._qkv = buffer(num_heads * config.head_dim)
        self._mixed = buffer(config.num_heads * config.head_dim)
        self._act = buffer(config.intermediate_size)
        self._state = GateState.build(rows, config.hidden_size, dtype)
        inner = config.intermediate_size
        self._neurons = NeuronState.build(rows, inner, dtype, is_joint=consensus)
        self._parts = parts_for(rows.max_num_rows, config.hidden_size, device)
        max_len = rows.block_tables.shape[1] * kv_cache.block_size
        attention = model.blocks[0].attention
        self._scratch = AttentionScratch(rows, attention, max_len, min_split=min_split)
        cos, sin = model.rotary.cos_sin(torch.arange(max_len, device=model.embedding.device))
        half = config.head_dim // 2  # one of the two halves says all: the second sine is +sin
        self._cos = cos[:, 0, :half].contiguous().to(device)
        self._sin = sin[:, 0, half:].contiguous().to(device)

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """What it keeps beside the model, the cache and the rows."""
        own = (self._h, self._qkv, self._mixed, self._act, self._parts, self._cos, self._sin)
        scratch = self._scratch
        attention = (scratch.maxima, scratch.sums, scratch.partial)
        return (*own, *self._state, *self._neurons.tensors, *attention)

    def step(self, num_rows: int, variant: Variant) -> None:
        """One token of each of the first `num_rows` rows: logits, K and V, and what was skipped.

        In a `stock` step nothing is: the kernels look at no flags and nobody decides. Rows leave
        out neurons in a step of that variant alone.
        """
        can_skip = variant != "stock"
        rows = self._rows
        assert 0 < num_rows <= rows.max_num_rows
        hidden = self._h.shape[1]
        block = min(1024, triton.next_power_of_2(hidden))
        _embed[(num_rows, triton.cdiv(hidden, block))](
            rows.token_ids, self._model.embedding, self._h, hidden, BLOCK=block
        )
        if variant == "neurons":
            limit(rows, self._neurons, num_rows)
        for layer, layer_block in enumerate(self._model.blocks):
            self._attend(layer, layer_block, num_rows, can_skip)
            if variant == "neurons":
                self._feed_forward_neurons(layer, layer_block, num_rows)
            else:
                run = self._state.runs[layer] if can_skip else None
                self._feed_forward(layer_block, num_rows, run)
        head, norm = self._model.lm_head, self._model.norm
        linear(self._h, head, rows.logits, num_rows, norm=norm, tiles=self._tiles)
        tell(rows, self._state, num_rows, can_skip=can_skip)
        if variant == "neurons":
            tell_neurons(rows, self._neurons, self._state.runs, num_rows)

    def _attend(self, layer: int, block: Block, num_rows: int, can_skip: bool) -> None:
        rows, state, attention = self._rows, self._state, block.attention
        linear(
            self._h,
            attention.qkv,
            self._qkv,
            num_rows,
            norm=block.norm1,
            decides=(rows, state, layer) if can_skip else None,
            consensus=self._consensus,
            tiles=self._tiles,
        )
        if can_skip and self._consensus:
            decide_together(rows, state, layer, num_rows)
        attend(
            self._qkv,
            self._mixed,
            attention,
            self._cache.keys[layer],
            self._cache.values[layer],
            self._cos,
            self._sin,
            rows,
            self._scratch,
            num_rows,
        )
        linear(
            self._mixed,
            attention.o,
            self._h,
            num_rows,
            is_residual=True,
            before=state.before if can_skip else None,
            parts=self._parts,
            tiles=self._tiles,
        )

    def _feed_forward(self, block: Block, num_rows: int, run: torch.Tensor | None) -> None:
        """`run` as the linears have it: the rows of 0 keep their residual."""
        h, act, ffn = self._h, self._act, block.ffn
        gate_up(h, block.norm2, ffn.gate_up, act, num_rows, run=run, tiles=self._tiles)
        down(act, ffn.down, h, num_rows, self._parts, run=run, tiles=self._down_tiles)

    def _feed_forward_neurons(self, layer: int, block: Block, num_rows: int) -> None:
        """The same for rows some of which leave out neurons."""
        h, act, neurons = self._h, self._act, self._neurons
        run, tiles = self._state.runs[layer], self._neuron_tiles
        leave_out(h, block, act, self._rows, neurons, run, layer, num_rows, tiles=tiles)
        down(
            act,
            block.ffn.down,
            h,
            num_rows,
            self._parts,
            run=run,
            neurons=(neurons, layer),
            tiles=self._down_tiles,
        )
