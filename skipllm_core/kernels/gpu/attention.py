"""Attention of one token a row over the paged KV cache, rotation and cache writes included.

    a program: one row, one KV head (and the query heads that share it), one split of the positions

Each split takes a softmax of its own, relative to its own maximum; a second kernel merges them in
a fixed order. The split that holds the row's own position norms and rotates the new key, writes it
and the value into the cache, and uses them; nobody else needs them in this step. How many splits
there are depends on the number of rows alone, so a captured graph serves every context; how long
they are, on what the row sees. One without positions returns at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipllm_core.kernels.gpu.linear import NUM_PROGRAMS
from skipllm_core.kernels.gpu.rows import DeviceRows
from skipllm_core.model.llama import Attention

# Of the keys that a program loads at once: several of these wait in shared memory, of which smaller
# GPUs have 99 KiB for a program.
TILE_BYTES = 2**15


@triton.jit
def _split_bounds(position, window, split, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """The positions first .. end - 1 of a split (or of several), none if end <= first."""
    seen_from = tl.where(window > 0, tl.maximum(0, position - window + 1), 0)
    num_seen = position + 1 - seen_from
    length = tl.cdiv(tl.cdiv(num_seen, SPLITS), MIN_SPLIT) * MIN_SPLIT
    first = seen_from + split * length
    return first, tl.minimum(first + length, position + 1)


@triton.jit
def _normed_half(x, squares, weight_ptr, D, eps, dtype):
    """Half a head after its RMSNorm; squares: of the whole head."""
    normed = (x / tl.sqrt(squares / D + eps)).to(dtype).to(tl.float32)
    return (normed * weight_ptr).to(dtype).to(tl.float32)


@triton.jit
def _attend(
    qkv_ptr, qk_norm_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, positions_ptr, tables_ptr,
    partial_ptr, maxima_ptr, sums_ptr,
    max_blocks, window, scale, eps,
    HAS_NORM: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
    GROUP_PAD: tl.constexpr, HALF_PAD: tl.constexpr, D_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions_ptr + row)
    first, end = _split_bounds(position, window, split, SPLITS, MIN_SPLIT)
    if first >= end:
        return
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    HALF: tl.constexpr = D // 2
    dtype = qkv_ptr.dtype.element_ty
    heads_ptr = qkv_ptr + row.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * D)
    g = tl.arange(0, GROUP_PAD)
    is_head = g < GROUP
    half = tl.arange(0, HALF_PAD)
    is_half = half < HALF
    d = tl.arange(0, D_PAD)
    is_d = d < D
    cos = tl.load(cos_ptr + position * HALF + half, mask=is_half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + half, mask=is_half, other=0.0).to(tl.float32)

    # Queries [GROUP_PAD, HALF_PAD] in two halves, rotated.
    head = kv_head * GROUP + g
    q_at = head[:, None] * D + half[None, :]
    q_mask = is_head[:, None] & is_half[None, :]
    q1 = tl.load(heads_ptr + q_at, mask=q_mask, other=0.0).to(tl.float32)
    q2 = tl.load(heads_ptr + q_at + HALF, mask=q_mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = (tl.sum(q1 * q1, 1) + tl.sum(q2 * q2, 1))[:, None]
        w1 = tl.load(qk_norm_ptr + q_at, mask=q_mask, other=0.0).to(tl.float32)
        w2 = tl.load(qk_norm_ptr + q_at + HALF, mask=q_mask, other=0.0).to(tl.float32)
        q1 = _normed_half(q1, squares, w1, D, eps, dtype)
        q2 = _normed_half(q2, squares, w2, D, eps, dtype)
    rotated1 = (q1 * cos[None, :] - q2 * sin[None, :]).to(dtype)
    rotated2 = (q2 * cos[None, :] + q1 * sin[None, :]).to(dtype)

    maxima = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    sums = tl.zeros((GROUP_PAD,), tl.float32)
    mixed = tl.zeros((GROUP_PAD, D_PAD), tl.float32)
    table_ptr = tables_ptr + row * max_blocks
    slot_stride = NUM_KV_HEADS * D

    # Positions whose keys lie in the cache: all but the row's own.
    for start in range(first, tl.minimum(end, position), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        is_seen = t < tl.minimum(end, position)
        block = tl.load(table_ptr + t // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + t % BLOCK_SIZE
        base = slot * slot_stride + kv_head * D
        k_mask = is_seen[None, :] & is_half[:, None]
        k1 = tl.load(keys_ptr + base[None, :] + half[:, None], mask=k_mask, other=0.0)
        k2 = tl.load(keys_ptr + base[None, :] + half[:, None] + HALF, mask=k_mask, other=0.0)
        scores = tl.dot(rotated1, k1, input_precision="ieee")
        scores = tl.dot(rotated2, k2, scores, input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_maxima = tl.maximum(maxima, tl.max(scores, 1))
        powers = tl.exp(scores - new_maxima[:, None])
        shrink = tl.exp(maxima - new_maxima)
        v_mask = is_seen[:, None] & is_d[None, :]
        values = tl.load(values_ptr + base[:, None] + d[None, :], mask=v_mask, other=0.0)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(powers.to(dtype), values, mixed, input_precision="ieee")
        sums = sums * shrink + tl.sum(powers, 1)
        maxima = new_maxima

    if end == position + 1:
        key_ptr = heads_ptr + (NUM_HEADS + kv_head) * D
        k1 = tl.load(key_ptr + half, mask=is_half, other=0.0).to(tl.float32)
        k2 = tl.load(key_ptr + HALF + half, mask=is_half, other=0.0).to(tl.float32)
        if HAS_NORM:
            # Names of their own: a name keeps its shape, also from one branch to another.
            key_squares = tl.sum(k1 * k1, 0) + tl.sum(k2 * k2, 0)
            norm_ptr = qk_norm_ptr + (NUM_HEADS + kv_head) * D
            norm1 = tl.load(norm_ptr + half, mask=is_half, other=0.0).to(tl.float32)
            norm2 = tl.load(norm_ptr + HALF + half, mask=is_half, other=0.0).to(tl.float32)
            k1 = _normed_half(k1, key_squares, norm1, D, eps, dtype)
            k2 = _normed_half(k2, key_squares, norm2, D, eps, dtype)
        new1 = (k1 * cos - k2 * sin).to(dtype)
        new2 = (k2 * cos + k1 * sin).to(dtype)
        value_ptr = heads_ptr + (NUM_HEADS + NUM_KV_HEADS + kv_head) * D
        value = tl.load(value_ptr + d, mask=is_d, other=0.0)
        block = tl.load(table_ptr + position // BLOCK_SIZE).to(tl.int64)
        base = (block * BLOCK_SIZE + position % BLOCK_SIZE) * slot_stride + kv_head * D
        tl.store(keys_ptr + base + half, new1, mask=is_half)
        tl.store(keys_ptr + base + HALF + half, new2, mask=is_half)
        tl.store(values_ptr + base + d, value, mask=is_d)
        score = tl.sum(rotated1.to(tl.float32) * new1.to(tl.float32)[None, :], 1)
        score += tl.sum(rotated2.to(tl.float32) * new2.to(tl.float32)[None, :], 1)
        score *= scale
        new_maxima = tl.maximum(maxima, score)
        power = tl.exp(score - new_maxima)
        shrink = tl.exp(maxima - new_maxima)
        mixed = mixed * shrink[:, None] + power[:, None] * value.to(tl.float32)[None, :]
        sums = sums * shrink + power
        maxima = new_maxima

    place = (row * NUM_HEADS + head) * SPLITS + split
    tl.store(maxima_ptr + place, maxima, mask=is_head)
    tl.store(sums_ptr + place, sums, mask=is_head)
    at = place[:, None] * D + d[None, :]
    tl.store(partial_ptr + at, mixed, mask=is_head[:, None] & is_d[None, :])


@triton.jit
def _merge(
    partial_ptr, maxima_ptr, sums_ptr, positions_ptr, out_ptr, window,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    position = tl.load(positions_ptr + row)
    split = tl.arange(0, SPLITS)
    first, end = _split_bounds(position, window, split, SPLITS, MIN_SPLIT)
    has_any = first < end
    place = (row * NUM_HEADS + head) * SPLITS + split
    maxima = tl.load(maxima_ptr + place, mask=has_any, other=float("-inf"))
    sums = tl.load(sums_ptr + place, mask=has_any, other=0.0)
    peak = tl.where(position >= 0, tl.max(maxima, 0), 0.0)  # a padded row has no split
    factors = tl.where(has_any, tl.exp(maxima - peak), 0.0)
    d = tl.arange(0, D_PAD)
    at = place[:, None] * D + d[None, :]
    parts = tl.load(partial_ptr + at, mask=has_any[:, None] & (d < D)[None, :], other=0.0)
    mixed = tl.sum(parts * factors[:, None], 0)
    total = tl.sum(sums * factors, 0)
    out = mixed / tl.where(position >= 0, total, 1.0)
    out_at = out_ptr + (row * NUM_HEADS + head) * D + d
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=d < D)


class AttentionScratch:
    """What the splits of one layer leave for the merge; every layer uses the same.

    A split has `min_split` positions at least (a power of two, 16 or more), and there are no more
    splits than `num_programs` programs of a step need, nor than 32.
    """

    def __init__(
        self,
        rows: DeviceRows,
        attention: Attention,
        max_len: int,
        *,
        min_split: int,
        num_programs: int = NUM_PROGRAMS,
    ) -> None:
        self.min_split = min_split
        self._num_programs = num_programs
        self._num_kv_heads = attention.num_kv_heads
        self._most = triton.next_power_of_2(min(32, triton.cdiv(max_len, min_split)))
        size = max(n * self.num_splits(n) for n in range(1, rows.max_num_rows + 1))
        size *= attention.num_heads
        self.maxima = torch.zeros(size, dtype=torch.float32, device=rows.device)
        self.sums = torch.zeros_like(self.maxima)
        self.partial = torch.zeros(
            size, attention.head_dim, dtype=torch.float32, device=rows.device
        )

    def num_splits(self, num_rows: int) -> int:
        """A power of two: what many rows, or many KV heads, do not need to fill the device."""
        wanted = triton.cdiv(self._num_programs, num_rows * self._num_kv_heads)
        return int(min(self._most, triton.next_power_of_2(wanted)))


def attend(
    qkv: Tensor,
    out: Tensor,
    attention: Attention,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: DeviceRows,
    scratch: AttentionScratch,
    num_rows: int,
) -> None:
    """out[:num_rows] [num_rows, num_heads * head_dim] of qkv [max_num_rows, (num_heads + 2
    num_kv_heads) * head_dim] as the projection left it; the rows' K and V go into the cache.

    keys, values [num_blocks, block_size, num_kv_heads, head_dim] of the layer; cos, sin [positions,
    head_dim / 2].
    """
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    head_dim = attention.head_dim
    norm = attention.qk_norm
    window = attention.window or 0
    num_splits = scratch.num_splits(num_rows)
    d_pad = max(16, triton.next_power_of_2(head_dim))
    _attend[(num_rows, num_kv_heads, num_splits)](
        qkv,
        qkv if norm is None else norm.weight,
        cos,
        sin,
        keys,
        values,
        rows.positions,
        rows.block_tables,
        scratch.partial,
        scratch.maxima,
        scratch.sums,
        rows.block_tables.shape[1],
        window,
        head_dim**-0.5,
        0.0 if norm is None else norm.eps,
        HAS_NORM=norm is not None,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        D=head_dim,
        BLOCK_SIZE=keys.shape[1],
        SPLITS=num_splits,
        MIN_SPLIT=scratch.min_split,
        GROUP_PAD=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        HALF_PAD=max(16, triton.next_power_of_2(head_dim // 2)),
        D_PAD=d_pad,
        BLOCK_T=min(64, scratch.min_split, max(16, TILE_BYTES // (d_pad * keys.itemsize))),
        num_warps=4,
    )
    _merge[(num_rows, num_heads)](
        scratch.partial,
        scratch.maxima,
        scratch.sums,
        rows.positions,
        out,
        window,
        NUM_HEADS=num_heads,
        D=head_dim,
        SPLITS=num_splits,
        MIN_SPLIT=scratch.min_split,
        D_PAD=d_pad,
        num_warps=1,
    )
