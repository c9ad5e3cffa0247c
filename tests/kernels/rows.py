"""Sequences for the CPU's kernels and for torch's operators, step by step."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipllm_core.config import Quantization
from skipllm_core.kernels import cpu
from skipllm_core.kernels.cpu import CpuDecoder
from skipllm_core.model.attention import ContextRow
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.llama import LlamaModel
from skipllm_core.model.loader import load_model
from skipllm_core.runner.decode import cpu_step, decode_step
from skipllm_core.skip.policy import NeverGate, SkipGate
from tests.model.checkpoints import VOCAB_SIZE

BLOCK_SIZE = 4
CPU = torch.device("cpu")

needs_the_kernels = pytest.mark.skipif(
    not cpu.is_available() and not os.environ.get("CI"), reason="the CPU kernels are not built"
)


def load(model_dir: Path, quantization: Quantization = "none") -> LlamaModel:
    return load_model(model_dir, device=CPU, dtype=torch.float32, quantization=quantization)


class Rows:
    """Sequences that a decoder computes token by token, each in scattered blocks of one cache."""

    def __init__(
        self, model: LlamaModel, prompts: list[list[int]], *, num_threads: int = 2
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.num_layers = model.config.num_layers
        longest = max(map(len, prompts))
        num_blocks = len(prompts) * (-(-longest // BLOCK_SIZE)) + 8
        self.kv_cache = KVCache(
            model.config,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            device=CPU,
        )
        for memory in (*self.kv_cache.keys, *self.kv_cache.values):
            memory.fill_(float("nan"))  # what was never written must never be seen
        blocks = list(range(num_blocks))
        random.Random(0).shuffle(blocks)
        self.block_tables = []
        for prompt in prompts:
            size = -(-len(prompt) // BLOCK_SIZE)
            self.block_tables.append(blocks[:size])
            blocks = blocks[size:]
        self.decoder = CpuDecoder(
            model,
            self.kv_cache,
            max_num_rows=len(prompts),
            max_model_len=longest,
            num_threads=num_threads,
        )

    @torch.inference_mode()
    def step(self, position: int, rows: list[int], gate: SkipGate | None = None) -> Tensor:
        """The logits of these rows' tokens at `position`."""
        return cpu_step(
            self.decoder,
            [self.prompts[row][position] for row in rows],
            [position] * len(rows),
            [self.block_tables[row] for row in rows],
            gate or NeverGate(len(rows)),
        )

    def all_logits(self) -> list[Tensor]:
        """Per row, the logits of all its tokens; a step has the rows that are not through yet."""
        found: list[list[Tensor]] = [[] for _ in self.prompts]
        for position in range(max(map(len, self.prompts))):
            rows = [row for row, prompt in enumerate(self.prompts) if position < len(prompt)]
            for row, logits in zip(rows, self.step(position, rows), strict=True):
                found[row].append(logits)
        return [torch.stack(logits) for logits in found]


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


class EagerRows(Rows):
    """The same by torch's operators."""

    @torch.inference_mode()
    def step(self, position: int, rows: list[int], gate: SkipGate | None = None) -> Tensor:
        ctx = self.model.context(
            [ContextRow(position, 1, self.block_tables[row]) for row in rows], self.kv_cache
        )
        token_ids = torch.tensor([self.prompts[row][position] for row in rows])
        return decode_step(self.model, token_ids, ctx, gate or NeverGate(len(rows)))
