"""A model whose decode step is computed twice: by the kernels, and by torch under a gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.kernels.gpu.linear import Tile
from skipllm_core.kernels.gpu.rows import DeviceRows, RowPolicy, Variant
from skipllm_core.model.attention import ContextRow
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.llama import LlamaModel
from skipllm_core.model.loader import load_model
from skipllm_core.runner.decode import decode_step
from skipllm_core.skip.neurons import NeuronSkip
from skipllm_core.skip.policy import NeverGate, SkipGate
from skipllm_core.types import SkipParams
from tests.model.checkpoints import VOCAB_SIZE, make_oracle

BLOCK_SIZE, MAX_BLOCKS, MAX_ROWS = 4, 8, 6
TOKENS = [5, 17, 301, 44, 9]
POSITIONS = [13, 0, 22, 7, 30]
TABLES = [list(range(8 * row, 8 * row + 8)) for row in (3, 1, 4, 0, 2)]
PADDING = -1


def tiles(num_rows: int, num_outputs: int, num_inputs: int) -> Tile:
    """As large as the interpreter likes them, and split where they may be."""
    return Tile(block_n=64, block_k=32, splits=2)


class Twins:
    """A model whose step is computed twice: by the kernels, and by torch under a gate. Both see
    the same past, which is random, and no NaN of what was never written."""

    def __init__(self, model: LlamaModel, device: torch.device, *, consensus: bool = False) -> None:
        self.model = model
        self.device = device
        self.num_layers = model.config.num_layers
        self.eager_cache, self.cache = self._cache(), self._cache()
        generator = torch.Generator().manual_seed(0)
        for layer in range(self.num_layers):
            for eager, ours in (
                (self.eager_cache.keys[layer], self.cache.keys[layer]),
                (self.eager_cache.values[layer], self.cache.values[layer]),
            ):
                past = torch.randn(ours.shape, generator=generator)
                for row, table in enumerate(TABLES):  # nothing at or after the row's own position
                    slots = past[table].flatten(0, 1)
                    slots[POSITIONS[row] :] = torch.nan
                    past[table] = slots.view(past[table].shape)
                ours.copy_(past)
                eager.copy_(past)
        self.rows = DeviceRows(
            max_num_rows=MAX_ROWS,
            max_blocks=MAX_BLOCKS,
            num_layers=self.num_layers,
            vocab_size=VOCAB_SIZE,
            device=device,
        )
        self.rows.logits.fill_(torch.nan)
        self.decoder = GpuDecoder(
            model,
            self.cache,
            self.rows,
            consensus=consensus,
            tiles=tiles,
            down_tiles=tiles,
            neuron_tiles=tiles,
        )

    def _cache(self) -> KVCache:
        return KVCache(
            self.model.config,
            num_blocks=BLOCK_SIZE * 10,
            block_size=BLOCK_SIZE,
            dtype=self.model.embedding.dtype,
            device=self.device,
        )

    def place(self, which: Sequence[int]) -> None:
        """These of the sequences above as rows 0, 1, ..; PADDING: a padded row."""
        for row, n in enumerate(which):
            if n == PADDING:
                self.rows.positions[row] = -1
                continue
            self.rows.token_ids[row] = TOKENS[n]
            self.rows.positions[row] = POSITIONS[n]
            self.rows.block_tables[row] = torch.tensor(TABLES[n], dtype=torch.int32)

    def set_skip(self, row: int, skip: SkipParams | None) -> None:
        if skip is None:
            self.rows.policies[row] = RowPolicy.NEVER
            return
        self.rows.policies[row] = RowPolicy.FFN_SKIP
        self.rows.thresholds[row] = skip.threshold
        self.rows.skip_from[row] = 0
        self.rows.cold_starts[row] = skip.cold_start
        self.rows.cold_ends[row] = skip.cold_end
        self.rows.max_skips[row] = self.num_layers if skip.max_skips is None else skip.max_skips

    def set_neurons(self, row: int, rule: NeuronSkip | None) -> None:
        self.rows.policies[row] = RowPolicy.NEVER if rule is None else RowPolicy.NEURONS
        if rule is not None:
            by_layer = list(zip(rule.up, rule.down, strict=True))
            self.rows.neuron_thresholds[row] = torch.tensor(by_layer)

    @torch.inference_mode()
    def step(self, num_rows: int, variant: Variant) -> Tensor:
        self.decoder.step(num_rows, variant)
        return self.rows.logits[:num_rows]

    @torch.inference_mode()
    def eager(self, which: Sequence[int], gate: SkipGate, ahead: int = 0) -> Tensor:
        """The step at so many positions behind POSITIONS."""
        rows = [ContextRow(POSITIONS[n] + ahead, 1, TABLES[n]) for n in which]
        ctx = self.model.context(rows, self.eager_cache)
        token_ids = torch.tensor([TOKENS[n] for n in which], device=self.device)
        return decode_step(self.model, token_ids, ctx, gate)

    def skipped(self, num_rows: int) -> list[list[int]]:
        return [row.nonzero()[:, 0].tolist() for row in self.rows.skipped[:num_rows]]

    def assert_neurons_are(self, gate: SkipGate) -> None:
        """What rows left out, which has to be something, and what no row wanted."""
        found = self.rows.neuron_counts.tolist()
        for row, counts in enumerate(gate.neurons.counts):
            assert list(map(tuple, found[row])) == (counts or [(0, 0)] * self.num_layers)
        assert int(self.rows.unread.sum()) == gate.neurons.num_unread_rows
        assert any(before_up and before_down for before_up, before_down in gate.neurons.counts[0])

    def assert_caches_agree(self, which: Sequence[int]) -> None:
        for layer in range(self.num_layers):
            for ours, eager in (
                (self.cache.keys[layer], self.eager_cache.keys[layer]),
                (self.cache.values[layer], self.eager_cache.values[layer]),
            ):
                torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4, equal_nan=True)
                for n in which:
                    block = TABLES[n][POSITIONS[n] // BLOCK_SIZE]
                    assert not ours[block, POSITIONS[n] % BLOCK_SIZE].isnan().any()


def twins(
    tmp_path: Path,
    device: torch.device,
    name: str = "llama3",
    *,
    consensus: bool = False,
    dtype: torch.dtype = torch.float32,
    **changes: int,
) -> Twins:
    make_oracle(name, **changes).save_pretrained(tmp_path)
    model = load_model(tmp_path, device=device, dtype=dtype)
    return Twins(model, device, consensus=consensus)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def similarities_of(pair: Twins, which: Sequence[int]) -> list[list[float]]:
    """Per layer, what a gate is shown when nothing is skipped."""
    seen: list[list[float]] = []

    class Recorder(NeverGate):
        def watches(self, layer: int) -> bool:
            return True

        def observe(self, layer: int, similarities: Sequence[float]) -> None:
            seen.append(list(similarities))

    pair.eager(which, Recorder(len(which)))
    return seen
