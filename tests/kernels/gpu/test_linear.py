"""The linears of the decode step against torch's, of shapes that are no multiples of the tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from skipllm_core.kernels.gpu.linear import Tile, gate_up, linear, parts_for, tile_for
from skipllm_core.model.layers import Linear, Place, RMSNorm

NUM_INPUTS, NUM_OUTPUTS, MAX_ROWS = 75, 37, 24
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def refuse_bf16_dots(device: torch.device, dtype: torch.dtype, num_rows: int) -> None:
    """In `tl.dot` Triton's interpreter multiplies the bits of bfloat16 as if they were integers."""
    if device.type == "cpu" and dtype == torch.bfloat16 and num_rows > 1:
        pytest.skip("tl.dot of bfloat16 is for devices")


def small_tiles(num_rows: int, num_outputs: int, num_inputs: int) -> Tile:
    return Tile(block_n=16, block_k=32)


def in_three_parts(num_rows: int, num_outputs: int, num_inputs: int) -> Tile:
    return Tile(block_n=16, block_k=16, splits=3)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def make_linear(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    outputs: int = NUM_OUTPUTS,
    inputs: int = NUM_INPUTS,
    bias: bool = False,
) -> Linear:
    made = Linear(inputs, outputs, bias=bias, place=Place(dtype, device))
    made.weight.copy_(normal(outputs, inputs, dtype=dtype, device=device) * inputs**-0.5)
    if made.bias is not None:
        made.bias.copy_(normal(outputs, dtype=dtype, device=device, seed=1))
    return made


def make_norm(device: torch.device, dtype: torch.dtype, size: int = NUM_INPUTS) -> RMSNorm:
    norm = RMSNorm(size, eps=1e-5, place=Place(dtype, device))
    norm.weight.copy_(normal(size, dtype=dtype, device=device, seed=2) * 0.3 + 1)
    return norm


def inputs_of(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(MAX_ROWS, NUM_INPUTS, dtype=dtype, device=device, seed=3)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norm_product_and_bias_are_torchs(
    device: torch.device, dtype: torch.dtype, num_rows: int
) -> None:
    refuse_bf16_dots(device, dtype, num_rows)
    weights, norm = make_linear(device, dtype, bias=True), make_norm(device, dtype)
    x = inputs_of(device, dtype)
    out = torch.full((MAX_ROWS, NUM_OUTPUTS), torch.nan, dtype=dtype, device=device)
    linear(x, weights, out, num_rows, norm=norm, tiles=small_tiles)
    expected = weights(norm(x[:num_rows]))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out[:num_rows], expected, atol=tolerance, rtol=tolerance)
    assert out[num_rows:].isnan().all(), "rows beyond the step's are left alone"


@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("tiles", [small_tiles, in_three_parts, tile_for])
def test_the_residual_is_added_to_and_kept(
    device: torch.device, num_rows: int, tiles: object
) -> None:
    weights = make_linear(device, bias=True)
    x = inputs_of(device)
    h = normal(MAX_ROWS, NUM_OUTPUTS, dtype=torch.float32, device=device, seed=4)
    before = torch.full_like(h, torch.nan)
    expected = h[:num_rows] + weights(x[:num_rows])
    untouched = h[num_rows:].clone()
    parts = parts_for(MAX_ROWS, NUM_OUTPUTS, device)
    linear(x, weights, h, num_rows, is_residual=True, before=before, parts=parts, tiles=tiles)  # type: ignore[arg-type]
    torch.testing.assert_close(h[:num_rows], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(before[:num_rows], h[:num_rows])
    assert torch.equal(h[num_rows:], untouched)


@pytest.mark.parametrize("tiles", [small_tiles, in_three_parts])
@pytest.mark.parametrize("run", [[1], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
def test_rows_that_skip_keep_their_residual_bit_for_bit(
    device: torch.device, run: list[int], tiles: object
) -> None:
    weights, x = make_linear(device), inputs_of(device)
    flags = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
    flags[: len(run)] = torch.tensor(run, dtype=torch.int32)
    flags[len(run) :] = 1  # what stands beyond the step's rows means nothing
    h = normal(MAX_ROWS, NUM_OUTPUTS, dtype=torch.float32, device=device, seed=4)
    old = h.clone()
    parts = parts_for(MAX_ROWS, NUM_OUTPUTS, device)
    linear(x, weights, h, len(run), is_residual=True, run=flags, parts=parts, tiles=tiles)  # type: ignore[arg-type]
    expected = old + weights(x)
    for row, runs in enumerate(run):
        if runs:
            torch.testing.assert_close(h[row], expected[row], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(h[row], old[row])
    assert torch.equal(h[len(run) :], old[len(run) :])


@pytest.mark.parametrize("num_rows", [1, 3])
def test_where_all_rows_skip_nothing_is_read_and_nothing_written(
    device: torch.device, num_rows: int
) -> None:
    """The weights and inputs are NaN: whoever touches them shows it."""
    flags = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
    flags[num_rows:] = 1
    poison = inputs_of(device).fill_(torch.nan)
    down = make_linear(device)
    up = make_linear(device, outputs=2 * NUM_OUTPUTS)
    norm = make_norm(device, torch.float32)
    for parameter in (down.weight, up.weight, norm.weight):
        parameter.fill_(torch.nan)
    h = normal(MAX_ROWS, NUM_OUTPUTS, dtype=torch.float32, device=device, seed=4)
    old = h.clone()
    for tiles in (small_tiles, in_three_parts):
        parts = torch.full_like(parts_for(MAX_ROWS, NUM_OUTPUTS, device), 7.0)
        linear(poison, down, h, num_rows, is_residual=True, run=flags, parts=parts, tiles=tiles)
        gate_up(poison, norm, up, h, num_rows, run=flags, tiles=tiles)
        assert torch.equal(h, old)
        assert (parts == 7.0).all()


@pytest.mark.parametrize("num_rows", [1, 2, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_are_torchs(device: torch.device, dtype: torch.dtype, num_rows: int) -> None:
    refuse_bf16_dots(device, dtype, num_rows)
    weights = make_linear(device, dtype, outputs=2 * NUM_OUTPUTS, bias=True)
    norm, h = make_norm(device, dtype), inputs_of(device, dtype)
    act = torch.zeros(MAX_ROWS, NUM_OUTPUTS, dtype=dtype, device=device)
    gate_up(h, norm, weights, act, num_rows, tiles=small_tiles)
    gate, up = weights(norm(h[:num_rows])).chunk(2, dim=-1)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(act[:num_rows], F.silu(gate) * up, atol=tolerance, rtol=tolerance)
    assert (act[num_rows:] == 0).all()


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_8_bits_are_widened_and_scaled(
    device: torch.device, dtype: torch.dtype, num_rows: int
) -> None:
    refuse_bf16_dots(device, dtype, num_rows)
    quantized = Linear(NUM_INPUTS, NUM_OUTPUTS, bias=True, place=Place(dtype, device, "int8"))
    plain = make_linear(device, dtype, bias=True)
    assert quantized.scale is not None
    assert quantized.bias is not None
    assert plain.bias is not None
    quantized.weight.copy_(
        torch.randint(-127, 128, (NUM_OUTPUTS, NUM_INPUTS), dtype=torch.int8, device=device)
    )
    quantized.scale.copy_(torch.rand(NUM_OUTPUTS, device=device) / 1000 + 1e-4)
    quantized.bias.copy_(plain.bias)
    plain.weight.copy_(quantized.weight.float() * quantized.scale[:, None])
    x = inputs_of(device, dtype)
    out = torch.zeros(MAX_ROWS, NUM_OUTPUTS, dtype=dtype, device=device)
    linear(x, quantized, out, num_rows, tiles=small_tiles)
    tolerance = 2 * TOLERANCES[dtype]
    torch.testing.assert_close(out[:num_rows], plain(x[:num_rows]), atol=tolerance, rtol=tolerance)
