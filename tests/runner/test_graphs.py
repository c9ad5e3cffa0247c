"""What can be said about CUDA graphs without a device: what has to outlive them."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skipllm_core.runner.graphs import CudaCapture


class FakeGraph:
    """Records nothing and knows no tensors, like a CUDA graph, which knows their addresses."""

    num_replays = 0

    def replay(self) -> None:
        FakeGraph.num_replays += 1


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes: dict[str, Any] = {
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "current_stream": lambda: stream,
        "CUDAGraph": FakeGraph,
        "graph": lambda graph, pool: nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.usefixtures("no_cuda")
def test_a_graph_keeps_the_memory_that_it_was_captured_over() -> None:
    class Decoder:
        def __init__(self) -> None:
            self.h = torch.zeros(4)

        def step(self) -> None:
            self.h += 1

    decoder = Decoder()
    buffer = weakref.ref(decoder.h)
    replay = CudaCapture()(decoder.step)
    del decoder
    gc.collect()
    assert buffer() is not None, "a replay would write to memory that is somebody else's"
    replay()
    assert FakeGraph.num_replays == 1
    del replay
    gc.collect()
    assert buffer() is None
