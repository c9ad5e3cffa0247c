"""More rows than a tile holds: each tile of rows does what the tile of few rows does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipllm_core.kernels.gpu import linear as linear_module
from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.kernels.gpu.linear import Tile, block_m
from skipllm_core.kernels.gpu.rows import DeviceRows, RowPolicy
from skipllm_core.model.attention import ContextRow
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.loader import load_model
from skipllm_core.runner.decode import decode_step
from skipllm_core.skip.policy import ForcedGate
from tests.model.checkpoints import VOCAB_SIZE, make_oracle

NUM_LAYERS = 3


def tiles(num_rows: int, num_outputs: int, num_inputs: int) -> Tile:
    return Tile(block_n=64, block_k=32, splits=2)


def test_a_tile_has_no_more_rows_than_a_device_has_room_for() -> None:
    assert [block_m(n) for n in (1, 2, 16, 17, 64, 65, 4096)] == [1, 16, 16, 32, 64, 64, 64]


@torch.inference_mode()
@pytest.mark.parametrize(("num_rows", "tile"), [(35, 16), (24, 64), (64, 64)])
def test_rows_in_several_tiles_equal_the_eager_step_and_tiles_skip_by_themselves(
    num_rows: int,
    tile: int,
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_module, "MAX_BLOCK_M", tile)  # 35 rows: tiles of 16, 16 and 3
    make_oracle("llama_biases", num_hidden_layers=NUM_LAYERS).save_pretrained(tmp_path)
    model = load_model(tmp_path, device=device, dtype=torch.float32)
    rows = DeviceRows(
        max_num_rows=num_rows,
        max_blocks=1,
        num_layers=NUM_LAYERS,
        vocab_size=VOCAB_SIZE,
        device=device,
    )
    cache = KVCache(
        model.config, num_blocks=num_rows, block_size=4, dtype=torch.float32, device=device
    )
    token_ids = torch.arange(num_rows)
    rows.token_ids.copy_(token_ids)
    rows.positions.fill_(0)
    rows.block_tables[:, 0] = torch.arange(num_rows, dtype=torch.int32)
    rows.policies.fill_(RowPolicy.MASK)
    mask = skipped_by_tiles(num_rows)
    rows.mask.copy_(mask)
    GpuDecoder(model, cache, rows, tiles=tiles).step(num_rows, "skip")
    gate = ForcedGate(mask.bool().tolist())
    ctx = model.context([ContextRow(0, 1, [row]) for row in range(num_rows)], cache)
    expected = decode_step(model, token_ids.to(device), ctx, gate)
    torch.testing.assert_close(rows.logits, expected, atol=2e-4, rtol=2e-4)
    assert torch.equal(rows.skipped.cpu(), mask)
    assert rows.num_needed.tolist() == (num_rows - mask.sum(dim=0)).tolist()


def skipped_by_tiles(num_rows: int) -> Tensor:
    """Layer 0: nobody; 1: the whole second tile, and one of the third; 2: every other row."""
    mask = torch.zeros(num_rows, NUM_LAYERS, dtype=torch.int32)
    mask[16:33, 1] = 1
    mask[::2, 2] = 1
    return mask
