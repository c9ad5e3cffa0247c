"""What a GPU decoder has to do, by torch's operators: the contract of `DeviceRows`."""

from __future__ import annotations

import torch
from torch import Tensor

from skipllm_core.kernels.gpu.rows import DeviceRows, RowPolicy, Variant
from skipllm_core.model.attention import ContextRow
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.llama import LlamaModel
from skipllm_core.runner.decode import decode_step
from skipllm_core.skip.baselines import PlannedSkip
from skipllm_core.skip.neurons import NeuronSkip
from skipllm_core.skip.policy import SkipRule, gate_for
from skipllm_core.types import SkipParams


class ReferenceDecoder:
    buffers: tuple[Tensor, ...] = ()

    def __init__(self, model: LlamaModel, kv_cache: KVCache, rows: DeviceRows) -> None:
        self.model, self.kv_cache, self.rows = model, kv_cache, rows
        self.steps: list[tuple[int, Variant]] = []

    def step(self, num_rows: int, variant: Variant) -> None:
        rows = self.rows
        self.steps.append((num_rows, variant))
        real = [row for row in range(num_rows) if rows.positions[row] >= 0]
        rows.logits[:num_rows] = float("nan")
        rows.skipped[:num_rows] = 0
        rows.num_needed[:] = 0
        if not real:
            return
        gate = gate_for([self._skip(row) if variant != "stock" else None for row in real])
        context = [
            ContextRow(int(rows.positions[row]), 1, rows.block_tables[row].tolist()) for row in real
        ]
        ctx = self.model.context(context, self.kv_cache)
        rows.logits[real] = decode_step(self.model, rows.token_ids[real].long(), ctx, gate)
        rows.num_needed[:] = len(real)
        for row, layers in zip(real, gate.skipped_layers, strict=True):
            rows.skipped[row, list(layers)] = 1
            rows.num_needed[list(layers)] -= 1
        if variant == "neurons":
            for row, neurons in zip(real, gate.neurons.counts, strict=True):
                rows.neuron_counts[row] = torch.tensor(neurons) if neurons else 0
            rows.unread.zero_()
            rows.unread[0, 0] = gate.neurons.num_unread_rows
        else:
            assert not gate.neurons.has_rules, "this variant leaves no neurons out"

    def _skip(self, row: int) -> SkipRule | None:
        rows = self.rows
        if rows.policies[row] == RowPolicy.NEVER or rows.positions[row] < rows.skip_from[row]:
            return None
        if rows.policies[row] == RowPolicy.MASK:
            return PlannedSkip(frozenset(rows.mask[row].nonzero().flatten().tolist()))
        if rows.policies[row] == RowPolicy.NEURONS:
            up, down = rows.neuron_thresholds[row].unbind(dim=1)
            return NeuronSkip(tuple(up.tolist()), tuple(down.tolist()))
        return SkipParams(
            policy="ffn_skip",
            threshold=float(rows.thresholds[row]),
            cold_start=int(rows.cold_starts[row]),
            cold_end=int(rows.cold_ends[row]),
            max_skips=int(rows.max_skips[row]),
        )
