"""What a decode step is made of, measured apart: memory, linears, a kernel that does nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from skipllm_core.bench.gpu.steps import milliseconds
from skipllm_core.kernels.gpu.down import down, down_tile_for
from skipllm_core.kernels.gpu.linear import Tiles, gate_up, linear, parts_for, tile_for
from skipllm_core.model.llama import Block, LlamaModel
from skipllm_core.runner.graphs import Capture, Launch

EMPTY_LAUNCHES = 100


def copy_bytes_per_s(device: torch.device, num_bytes: int = 2**31) -> float:
    """Device to device, bytes read and bytes written."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / milliseconds(lambda: target.copy_(source), device, 5) * 1e3


def linear_gb_per_s(
    model: LlamaModel,
    num_rows: int,
    capture: Capture,
    tiles: Tiles = tile_for,
    down_tiles: Tiles = down_tile_for,
) -> dict[str, float]:
    """How fast the linears of all layers, and the head, are read, by name, with `num_rows` rows and
    in the kernels of a stock step."""
    attentions = [block.attention for block in model.blocks]
    ffns = [block.ffn for block in model.blocks]
    linears = {
        "qkv": [one.qkv for one in attentions],
        "o": [one.o for one in attentions],
        "gate_up": [one.gate_up for one in ffns],
        "down": [one.down for one in ffns],
        "head": [model.lm_head],
    }
    found = {}
    for name, launch in _launches(model, num_rows, tiles, down_tiles).items():
        num_bytes = sum(one.weight.numel() * one.weight.itemsize for one in linears[name])
        ms = milliseconds(capture(launch), model.embedding.device)
        found[name] = num_bytes / ms / 1e6
    return found


def _launches(
    model: LlamaModel, num_rows: int, tiles: Tiles, down_tiles: Tiles
) -> dict[str, Launch]:
    config, device = model.config, model.embedding.device

    def rows_of(width: int, dtype: torch.dtype = model.embedding.dtype) -> torch.Tensor:
        return torch.randn(num_rows, width, device=device).to(dtype)

    h, act = rows_of(config.hidden_size), rows_of(config.intermediate_size)
    mixed = rows_of(config.num_heads * config.head_dim)
    qkv = rows_of(model.blocks[0].attention.qkv.weight.shape[0])
    logits = rows_of(config.vocab_size, torch.float32)
    parts = parts_for(num_rows, config.hidden_size, device)

    def run_qkv(block: Block) -> None:
        linear(h, block.attention.qkv, qkv, num_rows, norm=block.norm1, tiles=tiles)

    def run_o(block: Block) -> None:
        out = block.attention.o
        linear(mixed, out, h, num_rows, is_residual=True, parts=parts, tiles=tiles)

    def run_gate_up(block: Block) -> None:
        gate_up(h, block.norm2, block.ffn.gate_up, act, num_rows, tiles=tiles)

    def run_down(block: Block) -> None:
        down(act, block.ffn.down, h, num_rows, parts, tiles=down_tiles)

    def run_head() -> None:
        linear(h, model.lm_head, logits, num_rows, norm=model.norm, tiles=tiles)

    layers = {"qkv": run_qkv, "o": run_o, "gate_up": run_gate_up, "down": run_down}
    of_layers = {name: _in_all_layers(model, run) for name, run in layers.items()}
    return {**of_layers, "head": run_head}


def _in_all_layers(model: LlamaModel, run: Callable[[Block], None]) -> Launch:
    def launch() -> None:
        for block in model.blocks:
            run(block)

    return launch


def empty_kernel_us(
    model: LlamaModel, num_rows: int, capture: Capture, tiles: Tiles = tile_for
) -> float:
    """Microseconds of a predicated kernel in a graph when all its rows skip."""
    device, block = model.embedding.device, model.blocks[0]
    dtype = model.embedding.dtype
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    h = torch.zeros(num_rows, hidden, dtype=dtype, device=device)
    act = torch.zeros(num_rows, inner, dtype=dtype, device=device)
    nobody = torch.zeros(num_rows, dtype=torch.int32, device=device)

    def launch() -> None:
        for _ in range(EMPTY_LAUNCHES):
            gate_up(h, block.norm2, block.ffn.gate_up, act, num_rows, run=nobody, tiles=tiles)

    return milliseconds(capture(launch), device) / EMPTY_LAUNCHES * 1e3
