"""The whole decode step of the kernels against the eager one, and the gate on the device against
the gate on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.kernels.gpu.linear import Tile
from skipllm_core.kernels.gpu.rows import DeviceRows, RowPolicy
from skipllm_core.model.attention import ContextRow
from skipllm_core.model.llama import LlamaModel
from skipllm_core.model.loader import load_model
from skipllm_core.runner.decode import decode_step
from skipllm_core.runner.kv_cache import KVCache
from skipllm_core.skip.consensus import ConsensusGate
from skipllm_core.skip.policy import ForcedGate, NeverGate, RowGate, SkipGate
from skipllm_core.types import SkipParams
from tests.model.checkpoints import CHECKPOINTS, VOCAB_SIZE, make_oracle

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
        self.decoder = GpuDecoder(model, self.cache, self.rows, consensus=consensus, tiles=tiles)

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

    @torch.inference_mode()
    def step(self, num_rows: int, *, can_skip: bool) -> Tensor:
        self.decoder.step(num_rows, can_skip=can_skip)
        return self.rows.logits[:num_rows]

    @torch.inference_mode()
    def eager(self, which: Sequence[int], gate: SkipGate) -> Tensor:
        rows = [ContextRow(POSITIONS[n], 1, TABLES[n]) for n in which]
        ctx = self.model.context(rows, self.eager_cache)
        token_ids = torch.tensor([TOKENS[n] for n in which], device=self.device)
        return decode_step(self.model, token_ids, ctx, gate)

    def skipped(self, num_rows: int) -> list[list[int]]:
        return [row.nonzero()[:, 0].tolist() for row in self.rows.skipped[:num_rows]]

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
    **changes: int,
) -> Twins:
    make_oracle(name, **changes).save_pretrained(tmp_path)
    model = load_model(tmp_path, device=device, dtype=torch.float32)
    return Twins(model, device, consensus=consensus)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_every_familys_step_equals_the_eager_one(
    name: str, num_rows: int, tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device, name, num_hidden_layers=3)
    which = [2, 0, 4][:num_rows]
    pair.place(which)
    close(pair.step(num_rows, can_skip=False), pair.eager(which, NeverGate(num_rows)))
    pair.assert_caches_agree(which)
    assert pair.skipped(num_rows) == [[]] * num_rows
    assert pair.rows.num_needed.tolist() == [num_rows] * 3


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_heads_of_every_size(head_dim: int, tmp_path: Path, device: torch.device) -> None:
    pair = twins(tmp_path, device, "llama_head_dim", head_dim=head_dim, num_hidden_layers=1)
    pair.place([4, 0])
    close(pair.step(2, can_skip=False), pair.eager([4, 0], NeverGate(2)))


def test_the_skipping_step_without_skippers_equals_the_stock_one_bit_for_bit(
    tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device)
    pair.place([0, 1, 2])
    stock = pair.step(3, can_skip=False).clone()
    assert torch.equal(pair.step(3, can_skip=True), stock)
    assert pair.skipped(3) == [[]] * 3


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 0, 0, 0, 0]] * 3,
        [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]],
        [[0, 1, 1, 1, 0]] * 3,
        [[1, 1, 1, 1, 1]] * 3,
    ],
    ids=["none", "some", "all_of_a_layer", "every_block"],
)
def test_forced_masks_skip_what_the_host_gate_skips(
    mask: list[list[int]], tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device, num_hidden_layers=5)
    pair.place([0, 1, 2])
    for row in range(3):
        pair.rows.policies[row] = RowPolicy.MASK
        pair.rows.mask[row] = torch.tensor(mask[row], dtype=torch.int32)
    gate = ForcedGate([[bool(skips) for skips in row] for row in mask])
    expected = pair.eager([0, 1, 2], gate)
    if all(all(row) for row in zip(*mask, strict=True)):
        for block in pair.model.blocks:  # whoever reads them shows it
            block.ffn.gate_up.weight.fill_(torch.nan)
            block.ffn.down.weight.fill_(torch.nan)
    close(pair.step(3, can_skip=True), expected)
    assert pair.skipped(3) == gate.skipped_layers
    assert pair.rows.num_needed.tolist() == [3 - sum(layer) for layer in zip(*mask, strict=True)]


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


def test_rows_trigger_where_the_host_gate_triggers(tmp_path: Path, device: torch.device) -> None:
    pair = twins(tmp_path, device, num_hidden_layers=7)
    which = [0, 1, 2, 3, 4]
    seen = similarities_of(pair, which)
    # Between the similarities of a row, and away from them: rounding decides nothing.
    settings: list[SkipParams | None] = [None]
    for row, max_skips in ((1, None), (2, None), (3, 2), (4, None)):
        ranked = sorted(seen[layer][row] for layer in range(1, 5))
        threshold = (ranked[-1 - row % 2] + ranked[-2 - row % 2]) / 2
        skip = SkipParams(policy="ffn_skip", threshold=threshold, cold_start=1, cold_end=6)
        settings.append(replace(skip, max_skips=max_skips))
    pair.place(which)
    for row, skip in enumerate(settings):
        pair.set_skip(row, skip)
    gate = RowGate(settings)
    close(pair.step(5, can_skip=True), pair.eager(which, gate))
    assert pair.skipped(5) == gate.skipped_layers
    assert len({tuple(layers) for layers in gate.skipped_layers}) >= 3, "rows that differ"
    assert pair.skipped(5)[0] == []


def test_a_row_in_its_warm_up_runs_every_layer(tmp_path: Path, device: torch.device) -> None:
    pair = twins(tmp_path, device, num_hidden_layers=5)
    skip = SkipParams(policy="ffn_skip", threshold=-1.0, cold_start=1, cold_end=4)
    pair.place([0, 2])
    for row in range(2):
        pair.set_skip(row, skip)
    pair.rows.skip_from[0] = POSITIONS[0] + 1
    pair.rows.skip_from[1] = POSITIONS[2]
    pair.step(2, can_skip=True)
    assert pair.skipped(2) == [[], [2, 3]]


def test_a_row_is_what_it_is_alone_and_padding_changes_nothing(
    tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device, num_hidden_layers=5)
    skip = SkipParams(policy="ffn_skip", threshold=-1.0, cold_start=1, cold_end=4)
    pair.place([0, 1])
    pair.set_skip(0, skip)
    pair.set_skip(1, None)
    two = pair.step(2, can_skip=True).clone()
    skipped = pair.skipped(2)
    pair.place([0, 1, PADDING, PADDING])
    for row in (2, 3):
        pair.set_skip(row, None)
    four = pair.step(4, can_skip=True).clone()
    assert torch.equal(four[:2], two)
    assert pair.skipped(2) == skipped == [[2, 3], []]
    assert pair.rows.num_needed.tolist() == [2, 2, 1, 1, 2]
    pair.place([0, PADDING])
    pair.step(2, can_skip=True)
    assert pair.rows.num_needed.tolist() == [1, 1, 0, 0, 1], "padding keeps no layer awake"


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("slack", [0.0, 2.0])
def test_the_consensus_is_the_host_gates(
    share: float, slack: float, tmp_path: Path, device: torch.device
) -> None:
    pair = twins(tmp_path, device, consensus=True, num_hidden_layers=6)
    which = [0, 1, 2, 3]
    seen = similarities_of(pair, which)
    settings: list[SkipParams | None] = []
    for row in range(3):
        ranked = sorted(seen[layer][row] for layer in range(1, 4))
        middle = (ranked[row % 2] + ranked[row % 2 + 1]) / 2
        settings.append(SkipParams(policy="ffn_skip", threshold=middle, cold_start=1, cold_end=5))
    settings.append(None)  # in its warm-up: runs everything, and has no say
    pair.place(which)
    for row, skip in enumerate(settings):
        pair.set_skip(row, skip)
    pair.rows.consensus.copy_(torch.tensor([share, slack]))
    gate = ConsensusGate(settings, share=share, slack=slack)
    close(pair.step(4, can_skip=True), pair.eager(which, gate))
    assert pair.skipped(4) == gate.skipped_layers
    assert pair.skipped(4)[3] == []
    if slack == 2.0 and share == 0.3:
        assert any(gate.skipped_layers)
