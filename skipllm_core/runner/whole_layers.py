"""Steps whose rows leave out whole layers: `layer_drop` and `early_exit`, for comparison.

Not fast: every layer's attention is computed for all rows, and kept for those that run the layer.
It is what makes `early_exit` right: a row that has left the stack still writes K and V of the
layers behind its exit, from the residual at the exit, which is SkipDecode's state copying (arXiv
2307.02628). What `layer_drop` writes in its dropped layers is never read, as no token of the
sequence attends there.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from skipllm_core.skip.policy import SkipGate


def without_attention(
    attended: Tensor, h: Tensor, gate: SkipGate, running: Collection[int]
) -> Tensor:
    """The residual behind a layer's attention: `attended`, but `h` as it was for the gate's
    `whole_layer_rows` that are not `running` the layer. [num_rows, hidden] each."""
    rows = sorted(set(gate.whole_layer_rows).difference(running))
    if not rows:
        return attended
    index = torch.tensor(rows, device=h.device)
    return attended.index_copy(0, index, h.index_select(0, index))
