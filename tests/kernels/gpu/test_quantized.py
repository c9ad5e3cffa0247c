"""The decode step over weights of 8 bits, against torch over the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skipllm_core.config import Quantization
from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.kernels.gpu.linear import Tile
from skipllm_core.kernels.gpu.rows import DeviceRows, RowPolicy
from skipllm_core.model.attention import ContextRow
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.layers import Linear
from skipllm_core.model.llama import LlamaModel
from skipllm_core.model.loader import load_model
from skipllm_core.runner.decode import decode_step
from skipllm_core.skip.policy import ForcedGate
from tests.model.checkpoints import VOCAB_SIZE, make_oracle

NUM_LAYERS = 2
TOKEN_IDS = [5, 301, 44]


def tiles(num_rows: int, num_outputs: int, num_inputs: int) -> Tile:
    return Tile(block_n=64, block_k=32, splits=2)


def quantized(model_dir: Path, device: torch.device, quantization: Quantization) -> LlamaModel:
    model = load_model(model_dir, device=device, dtype=torch.float32, quantization=quantization)
    for module in model.modules():
        if isinstance(module, Linear):
            module.rounds_inputs = False  # as on CUDA, wherever this runs
    return model


def cache_for(model: LlamaModel, device: torch.device) -> KVCache:
    return KVCache(model.config, num_blocks=3, block_size=4, dtype=torch.float32, device=device)


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", ["llama3_tied", "llama_biases"])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_step_over_8_bits_equals_the_eager_one_and_skips_alike(
    quantization: Quantization, name: str, num_rows: int, tmp_path: Path, device: torch.device
) -> None:
    make_oracle(name, num_hidden_layers=NUM_LAYERS).save_pretrained(tmp_path)
    model = quantized(tmp_path, device, quantization)
    rows = DeviceRows(
        max_num_rows=3, max_blocks=1, num_layers=NUM_LAYERS, vocab_size=VOCAB_SIZE, device=device
    )
    cache = cache_for(model, device)
    decoder = GpuDecoder(model, cache, rows, tiles=tiles)
    rows.positions[:num_rows] = 0
    rows.token_ids[:num_rows] = torch.tensor(TOKEN_IDS[:num_rows], dtype=torch.int32)
    rows.block_tables[:, 0] = torch.arange(3, dtype=torch.int32)
    rows.policies.fill_(RowPolicy.MASK)
    rows.mask[0, 1] = 1
    decoder.step(num_rows, "skip")
    ctx = model.context([ContextRow(0, 1, [row]) for row in range(num_rows)], cache)
    gate = ForcedGate([[False, row == 0] for row in range(num_rows)])
    token_ids = torch.tensor(TOKEN_IDS[:num_rows], device=device)
    expected = decode_step(model, token_ids, ctx, gate)
    torch.testing.assert_close(rows.logits[:num_rows], expected, atol=5e-4, rtol=5e-4)
    assert rows.num_needed.tolist() == [num_rows, num_rows - 1]


@torch.inference_mode()
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_skipped_layers_scales_are_not_read_either(
    quantization: Quantization, tmp_path: Path, device: torch.device
) -> None:
    make_oracle("llama3", num_hidden_layers=NUM_LAYERS).save_pretrained(tmp_path)
    model = quantized(tmp_path, device, quantization)
    rows = DeviceRows(
        max_num_rows=1, max_blocks=1, num_layers=NUM_LAYERS, vocab_size=VOCAB_SIZE, device=device
    )
    rows.positions[0] = 0
    rows.policies.fill_(RowPolicy.MASK)
    rows.mask[0, 1] = 1
    for linear in (model.blocks[1].ffn.gate_up, model.blocks[1].ffn.down):
        assert linear.scale is not None
        linear.scale.fill_(torch.nan)
    decoder = GpuDecoder(model, cache_for(model, device), rows, tiles=tiles)
    decoder.step(1, "skip")
    assert rows.logits.isfinite().all()
    decoder.step(1, "stock")
    assert rows.logits.isnan().all(), "the scales were poisoned"
