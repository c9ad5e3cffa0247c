"""What a step with rows that leave neurons out keeps on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from skipllm_core.kernels.gpu.rows import DeviceRows


class NeuronState(NamedTuple):
    """`is_joint`: rows leave out together (skip/neurons.py); what that needs is empty otherwise.

    A row tile is what one program has of the rows; `flags` are added up of those of down.py.
    """

    is_joint: bool
    limits: Tensor  # [num_layers, rows, 2] float32: thresholds; 0 for a row that leaves none out
    flags: Tensor  # [row tiles, inner] int8: of the layer at hand, what down has to know
    # Row by row: 0 for a neuron that is kept, 1 for one that is out before up, 2 before down.
    gone: Tensor  # [num_layers, rows, inner] int8
    # Together: the sum over these rows of the squared score, how many would leave the neuron out,
    # and what they leave out before up; what the launch for gates hands to the one for up.
    scores: Tensor  # [row tiles, inner] float32
    votes: Tensor  # [row tiles, inner] int32
    joint_gone: Tensor  # [inner] int8: 1 or 0
    gates: Tensor  # [rows, inner]
    factors: Tensor  # [rows] float32, of the norm

    @classmethod
    def build(
        cls, rows: DeviceRows, inner: int, dtype: torch.dtype, *, is_joint: bool
    ) -> NeuronState:
        num_rows = rows.max_num_rows
        padded = triton.cdiv(num_rows, 2) * 2  # so that a layer's limits begin at 16 bytes
        num_tiles = triton.cdiv(num_rows, 16)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=rows.device)

        together, alone = (inner, 0) if is_joint else (0, inner)
        return cls(
            is_joint,
            limits=zeros(rows.num_layers, padded, 2, dtype=torch.float32),
            flags=zeros(num_tiles, inner, dtype=torch.int8),
            gone=zeros(rows.num_layers, num_rows, alone, dtype=torch.int8),
            scores=zeros(num_tiles, together, dtype=torch.float32),
            votes=zeros(num_tiles, together, dtype=torch.int32),
            joint_gone=zeros(together, dtype=torch.int8),
            gates=zeros(num_rows, together, dtype=dtype),
            factors=zeros(num_rows if is_joint else 0, dtype=torch.float32),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(part for part in self if isinstance(part, Tensor))
