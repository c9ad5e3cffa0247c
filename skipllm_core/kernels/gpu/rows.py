"""The rows of a decode step as the kernels see them: device tensors that stay where they are."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

import torch


class RowPolicy(IntEnum):
    """What a row skips of its FFN blocks; with a position below `skip_from`, nothing."""

    NEVER = 0
    FFN_SKIP = 1
    MASK = 2  # exactly the blocks of `mask`
    NEURONS = 3  # no blocks, but neurons below `neuron_thresholds`


# What the rows of a step may do at most: skip nothing, blocks, or blocks and neurons.
Variant = Literal["stock", "skip", "neurons"]


class DeviceRows:
    """What a decode step reads of its rows and what it tells of them.

    The tensors are made once, so that a captured CUDA graph replays over whatever stands in them.
    Rows 0 .. num_rows - 1 of a step are computed; a padded one among them has position -1, needs no
    layer, writes no K and V, and its outputs mean nothing.
    """

    def __init__(
        self,
        *,
        max_num_rows: int,
        max_blocks: int,
        num_layers: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_num_rows = max_num_rows
        self.num_layers = num_layers
        self.device = device
        # In: the token, its position, and where its sequence's K and V lie.
        self.token_ids = zeros(max_num_rows, dtype=torch.int32)
        self.positions = zeros(max_num_rows, dtype=torch.int32).fill_(-1)
        self.block_tables = zeros(max_num_rows, max_blocks, dtype=torch.int32)
        # In: what the row may skip, as SkipParams has it.
        self.policies = zeros(max_num_rows, dtype=torch.int32)  # RowPolicy
        self.thresholds = zeros(max_num_rows, dtype=torch.float32).fill_(1.0)
        self.skip_from = zeros(max_num_rows, dtype=torch.int32)  # first position that may skip
        self.cold_starts = zeros(max_num_rows, dtype=torch.int32)
        self.cold_ends = zeros(max_num_rows, dtype=torch.int32)
        self.max_skips = zeros(max_num_rows, dtype=torch.int32).fill_(num_layers)
        self.mask = zeros(max_num_rows, num_layers, dtype=torch.int32)  # 1: skipped by MASK rows
        # In: of each layer, before up and before down.
        self.neuron_thresholds = zeros(max_num_rows, num_layers, 2, dtype=torch.float32)
        # In: phi and delta of the consensus rule; phi 0: row_exact.
        self.consensus = zeros(2, dtype=torch.float32)
        # Out.
        self.logits = zeros(max_num_rows, vocab_size, dtype=torch.float32)
        self.skipped = zeros(max_num_rows, num_layers, dtype=torch.int32)  # 1: the row skipped it
        self.num_needed = zeros(num_layers, dtype=torch.int32)  # rows that ran the layer's FFN
        # Out, of steps that leave out neurons: how many each row left out of a layer that it ran,
        # before up and before down; and of how many no row wanted the weights of up, of down.
        self.neuron_counts = zeros(max_num_rows, num_layers, 2, dtype=torch.int32)
        self.unread = zeros(num_layers, 2, dtype=torch.int32)
