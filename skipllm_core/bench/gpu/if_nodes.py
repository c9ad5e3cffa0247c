"""The decode step with its FFNs behind IF nodes of the CUDA graph, to compare with predication.

Predicated kernels are launched and return; behind an IF node they are not launched. A row that
skips alone keeps its residual as before: a node asks whether any row runs. (Never run so far.)
"""

from __future__ import annotations

from typing import Any

import torch

from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.model.llama import Block


def has_if_nodes() -> bool:
    """Torch 2.12 and later can capture them."""
    return hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node")


class IfNodeDecoder(GpuDecoder):
    """Differs from its base class in captured steps alone."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._does_any_run = torch.zeros((), dtype=torch.bool, device=self._h.device)

    def _feed_forward(self, block: Block, num_rows: int, run: torch.Tensor | None) -> None:
        if run is None or not torch.cuda.is_current_stream_capturing():
            super()._feed_forward(block, num_rows, run)
            return
        torch.any(run[:num_rows], out=self._does_any_run)
        graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()
        graph.begin_capture_to_if_node(self._does_any_run)
        try:
            super()._feed_forward(block, num_rows, run)
        finally:
            graph.end_capture_to_conditional_node()
