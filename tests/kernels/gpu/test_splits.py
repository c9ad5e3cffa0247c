"""Attention whose positions several programs share: the merge of splits long, short and empty."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skipllm_core.kernels.gpu.attention import AttentionScratch
from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.kernels.gpu.rows import DeviceRows
from skipllm_core.model.attention import ContextRow
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.loader import load_model
from skipllm_core.runner.decode import decode_step
from skipllm_core.skip.policy import NeverGate
from tests.model.checkpoints import VOCAB_SIZE, make_oracle
from tests.runner.tiny import write_config

BLOCK_SIZE, MAX_BLOCKS, NUM_LAYERS = 4, 40, 1
# One key, less than a split, a split and one more, splits of several tiles that end unevenly.
POSITIONS = [0, 9, 16, 159, 101]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama2", "mistral_window"])
def test_the_merged_splits_are_the_eager_attention(
    name: str, tmp_path: Path, device: torch.device
) -> None:
    make_oracle(name, num_hidden_layers=NUM_LAYERS).save_pretrained(tmp_path)
    model = load_model(tmp_path, device=device, dtype=torch.float32)
    caches = [
        KVCache(
            model.config,
            num_blocks=len(POSITIONS) * MAX_BLOCKS,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            device=device,
        )
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(POSITIONS) * MAX_BLOCKS, generator=generator)
    tables = order.view(len(POSITIONS), MAX_BLOCKS)
    for memories in zip(*[(*cache.keys, *cache.values) for cache in caches], strict=True):
        past = torch.randn(memories[0].shape, generator=generator)
        for table, position in zip(tables, POSITIONS, strict=True):
            slots = past[table].flatten(0, 1)
            slots[position:] = torch.nan  # never written: must not be seen
            past[table] = slots.view(MAX_BLOCKS, *past.shape[1:])
        for memory in memories:
            memory.copy_(past)
    num_rows = len(POSITIONS)
    rows = DeviceRows(
        max_num_rows=num_rows + 1,
        max_blocks=MAX_BLOCKS,
        num_layers=NUM_LAYERS,
        vocab_size=VOCAB_SIZE,
        device=device,
    )
    rows.positions[:num_rows] = torch.tensor(POSITIONS, dtype=torch.int32)
    rows.token_ids[:num_rows] = torch.arange(7, 7 + num_rows, dtype=torch.int32)
    rows.block_tables[:num_rows] = tables.to(torch.int32)
    decoder = GpuDecoder(model, caches[0], rows, min_split=16)
    decoder.step(num_rows, "stock")
    context = [
        ContextRow(position, 1, table.tolist())
        for position, table in zip(POSITIONS, tables, strict=True)
    ]
    token_ids = torch.arange(7, 7 + num_rows, device=device)
    expected = decode_step(model, token_ids, model.context(context, caches[1]), NeverGate(num_rows))
    torch.testing.assert_close(rows.logits[:num_rows], expected, atol=2e-4, rtol=2e-4)


def test_few_rows_are_shared_by_many_programs_and_many_rows_by_few(tmp_path: Path) -> None:
    write_config(tmp_path)  # 2 KV heads
    cpu = torch.device("cpu")
    model = load_model(tmp_path, device=cpu, dtype=torch.float32, load_format="dummy")
    rows = DeviceRows(max_num_rows=64, max_blocks=1, num_layers=1, vocab_size=8, device=cpu)

    def splits(num_rows: int, max_len: int) -> int:
        attention = model.blocks[0].attention
        scratch = AttentionScratch(rows, attention, max_len, min_split=64, num_programs=264)
        found = scratch.num_splits(num_rows)
        assert num_rows * found * attention.num_heads <= scratch.maxima.numel()
        return found

    assert splits(1, 100_000) == 32  # no more, however few the rows
    assert splits(1, 256) == 4  # no shorter than 64 positions
    assert splits(16, 100_000) == 16  # 264 / (16 * 2) = 8.25, in powers of two
    assert splits(64, 100_000) == 4
