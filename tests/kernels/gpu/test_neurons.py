"""One layer's neurons left out by the kernels, against torch's operators with the same rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from skipllm_core.config import Quantization
from skipllm_core.kernels.gpu import linear as linear_module
from skipllm_core.kernels.gpu.down import down, down_tile_for
from skipllm_core.kernels.gpu.linear import Tile, Tiles, gate_up, parts_for
from skipllm_core.kernels.gpu.neuron_state import NeuronState
from skipllm_core.kernels.gpu.neurons import leave_out, limit, tell_neurons
from skipllm_core.kernels.gpu.rows import DeviceRows, RowPolicy
from skipllm_core.model.layers import Linear
from skipllm_core.model.llama import Block
from skipllm_core.model.loader import load_model
from skipllm_core.runner.neurons import feed_forward_neurons
from skipllm_core.skip.neurons import NeuronCounts
from tests.kernels.gpu.test_linear import normal
from tests.runner.tiny import write_config

HIDDEN, INNER, LAYER, NUM_LAYERS = 40, 75, 1, 2  # no multiples of the tiles
Thresholds = tuple[float, float]


def tiles(num_rows: int, num_outputs: int, num_inputs: int) -> Tile:
    return Tile(block_n=32, block_k=32, splits=2)


class Layer:
    """Layer 1 of a model of two, and so many rows behind its attention."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        num_rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        is_joint: bool = False,
        quantization: Quantization = "none",
        has_bias: bool = True,
    ) -> None:
        changes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "mlp_bias": has_bias}
        write_config(folder, num_hidden_layers=NUM_LAYERS, head_dim=8, **changes)
        model = load_model(
            folder, device=device, dtype=dtype, load_format="dummy", quantization=quantization
        )
        for module in model.modules():
            if isinstance(module, Linear):
                module.rounds_inputs = False  # as on CUDA, wherever this runs
        self.block: Block = model.blocks[LAYER]
        self.num_rows = num_rows
        generator = torch.Generator().manual_seed(3)
        self.h = torch.randn(num_rows, HIDDEN, generator=generator).to(device, dtype)
        self.rows = DeviceRows(
            max_num_rows=num_rows + 1,
            max_blocks=1,
            num_layers=NUM_LAYERS,
            vocab_size=8,
            device=device,
        )
        self.rows.positions[:num_rows] = 5
        self.runs = torch.zeros(NUM_LAYERS, num_rows + 1, dtype=torch.int32, device=device)
        self.runs[:, :num_rows] = 1
        self.state = NeuronState.build(self.rows, INNER, dtype, is_joint=is_joint)
        for part in self.state.tensors:  # whoever reads what this step has not written shows it
            part.fill_(torch.nan if part.is_floating_point() else 77)

    @torch.inference_mode()
    def expected(self, thresholds: Sequence[Thresholds]) -> tuple[Tensor, NeuronCounts]:
        is_joint = self.state.is_joint
        return feed_forward_neurons(self.block, self.h, thresholds, is_joint=is_joint)

    @torch.inference_mode()
    def found(self, thresholds: Sequence[Thresholds]) -> Tensor:
        rows, runs, num_rows = self.rows, self.runs[LAYER], self.num_rows
        for row, of_row in enumerate(thresholds):
            if of_row != (0.0, 0.0):
                rows.policies[row] = RowPolicy.NEURONS
                rows.neuron_thresholds[row, LAYER] = torch.tensor(of_row)
        h = torch.cat((self.h, self.h.new_full((1, HIDDEN), torch.nan)))
        act = h.new_full((num_rows + 1, INNER), torch.nan)
        parts = parts_for(num_rows, HIDDEN, h.device).fill_(torch.nan)
        limit(rows, self.state, num_rows)
        leave_out(h, self.block, act, rows, self.state, runs, LAYER, num_rows, tiles=tiles)
        neurons, ffn = (self.state, LAYER), self.block.ffn
        down(act, ffn.down, h, num_rows, parts, run=runs, neurons=neurons, tiles=tiles)
        tell_neurons(rows, self.state, self.runs, num_rows)
        assert h[num_rows:].isnan().all(), "rows beyond the step's are left alone"
        return h[:num_rows]

    @torch.inference_mode()
    def thresholds(self, *shares: Thresholds) -> list[Thresholds]:
        """At which a row leaves out about these shares of its neurons, before up, and of the rest
        before down; between two neurons' scores, so that rounding decides nothing."""
        gate, up = self.block.ffn.gate_up(self.block.norm2(self.h)).chunk(2, dim=-1)
        first = F.silu(gate).float().abs() * self.block.ffn.down_norms
        second = (F.silu(gate) * up).float().abs() * self.block.ffn.down_norms
        found = []
        for row, (before_up, before_down) in enumerate(shares):
            limits = []
            left = torch.ones(INNER, dtype=torch.bool, device=self.h.device)
            for scores, share in ((first[row], before_up), (second[row], before_down)):
                ranked = scores[left].sort().values
                at = int(share * len(ranked))
                limits.append(float(ranked[at - 1] + ranked[at]) / 2 if at else 0.0)
                left &= scores >= limits[-1]
            found.append((limits[0], limits[1]))
        return found

    def assert_counts_are(self, counts: NeuronCounts) -> None:
        told = self.rows.neuron_counts[: self.num_rows, LAYER]
        assert told[:, 0].tolist() == list(counts.before_up)
        assert told[:, 1].tolist() == list(counts.before_down)
        unread = [counts.unread_up, counts.unread_down]
        assert self.rows.unread[LAYER].tolist() == unread


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


SHARES: list[Thresholds] = [(0.4, 0.3), (0.0, 0.0), (0.6, 0.0), (0.0, 0.5), (0.9, 0.9)]


@pytest.mark.parametrize("is_joint", [False, True], ids=["row_exact", "consensus"])
@pytest.mark.parametrize("shares", [SHARES[:1], SHARES[3:4], SHARES[::2], SHARES], ids=str)
def test_rows_leave_out_what_the_eager_step_leaves_out(
    shares: list[Thresholds], is_joint: bool, tmp_path: Path, device: torch.device
) -> None:
    layer = Layer(tmp_path, device, len(shares), is_joint=is_joint)
    thresholds = layer.thresholds(*shares)
    expected, counts = layer.expected(thresholds)
    found = layer.found(thresholds)
    close(found, expected)
    layer.assert_counts_are(counts)
    assert int(layer.rows.neuron_counts[:, LAYER].sum()) > INNER // 4
    again = layer.found(thresholds)
    assert torch.equal(again, found), "bit for bit"


@pytest.mark.parametrize(
    ("dtype", "num_rows"),
    [(torch.float16, 1), (torch.float16, 3), (torch.bfloat16, 1), (torch.bfloat16, 3)],
    ids=str,
)
def test_half_precision(
    dtype: torch.dtype, num_rows: int, tmp_path: Path, device: torch.device
) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16 and num_rows > 1:
        pytest.skip("tl.dot of bfloat16 is for devices")
    layer = Layer(tmp_path, device, num_rows, dtype=dtype)
    thresholds = layer.thresholds(*SHARES[:num_rows])
    # A sum that is rounded to the other side may take a neuron along: look at what it adds.
    found, (expected, _) = layer.found(thresholds), layer.expected(thresholds)
    close(found, expected)
    assert int(layer.rows.neuron_counts[0, LAYER, 0]) == pytest.approx(0.4 * INNER, abs=2)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("is_joint", [False, True], ids=["row_exact", "consensus"])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_weights_in_8_bits_are_widened_and_scaled(
    quantization: Quantization, is_joint: bool, num_rows: int, tmp_path: Path, device: torch.device
) -> None:
    layer = Layer(tmp_path, device, num_rows, is_joint=is_joint, quantization=quantization)
    thresholds = layer.thresholds(*SHARES[::2][:num_rows])
    expected, counts = layer.expected(thresholds)
    close(layer.found(thresholds), expected)
    layer.assert_counts_are(counts)


def poison_what_nobody_wants(layer: Layer, gone: Tensor) -> None:
    """gone [num_rows, inner]: 1 out before up, 2 before down."""
    ffn = layer.block.ffn
    ffn.gate_up.weight[INNER:][(gone == 1).all(dim=0)] = torch.nan
    ffn.down.weight[:, (gone > 0).all(dim=0)] = torch.nan


@pytest.mark.parametrize("is_joint", [False, True], ids=["row_exact", "consensus"])
@pytest.mark.parametrize("num_rows", [1, 3])
@torch.inference_mode()
def test_what_no_row_wants_is_not_read(
    is_joint: bool, num_rows: int, tmp_path: Path, device: torch.device
) -> None:
    layer = Layer(tmp_path, device, num_rows, is_joint=is_joint)
    thresholds = layer.thresholds(*[(0.4, 0.4), (0.7, 0.5), (0.5, 0.7)][:num_rows])
    expected, counts = layer.expected(thresholds)
    clean = layer.found(thresholds)
    if is_joint:
        seen = layer.state.flags[0] == 2  # wanted by nobody
        gone = layer.state.joint_gone + 2 * ((layer.state.joint_gone == 0) & seen)
        gone = gone.expand(num_rows, -1)
    else:
        gone = layer.state.gone[LAYER, :num_rows].clone()
    poison_what_nobody_wants(layer, gone)
    weights = (layer.block.ffn.gate_up.weight, layer.block.ffn.down.weight)
    poisoned = [
        int(weight.isnan().any(dim=dim).sum()) for weight, dim in zip(weights, (1, 0), strict=True)
    ]
    assert poisoned == [counts.unread_up, counts.unread_down]
    assert min(poisoned) > 3
    found = layer.found(thresholds)
    assert torch.equal(found, clean), "nothing of them was seen"
    close(found, expected)
    nothing = [(0.0, 0.0)] * num_rows
    layer.rows.policies.fill_(RowPolicy.NEVER)
    assert layer.found(nothing).isnan().all(), "they were poisoned"


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [1, 3])
def test_thresholds_of_nothing_are_the_stock_ffn_bit_for_bit(
    num_rows: int, tmp_path: Path, device: torch.device
) -> None:
    layer = Layer(tmp_path, device, num_rows)
    ffn, h = layer.block.ffn, layer.h.clone()
    act = h.new_zeros(num_rows, INNER)
    gate_up(h, layer.block.norm2, ffn.gate_up, act, num_rows, tiles=tiles)
    down(act, ffn.down, h, num_rows, parts_for(num_rows, HIDDEN, h.device), tiles=tiles)
    layer.rows.policies.fill_(RowPolicy.NEURONS)
    assert torch.equal(layer.found([(0.0, 0.0)] * num_rows), h)
    assert not layer.rows.neuron_counts[:, LAYER].any()
    # Nor does a row leave anything out that has thresholds and is not under the rule yet.
    layer.rows.skip_from.fill_(6)
    assert torch.equal(layer.found([(9.9, 9.9)] * num_rows), h)


@pytest.mark.parametrize("is_joint", [False, True], ids=["row_exact", "consensus"])
@pytest.mark.parametrize("tile", [16, 64])
def test_rows_in_several_tiles_some_of_which_skip_the_block(
    is_joint: bool,
    tile: int,
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_module, "MAX_BLOCK_M", tile)
    num_rows = 34  # of tiles of 16: the second one skips, the third has two rows
    layer = Layer(tmp_path, device, num_rows, is_joint=is_joint)
    thresholds = layer.thresholds(*([(0.5, 0.4), (0.0, 0.0), (0.7, 0.2)] * 12)[:num_rows])
    skips = [row == 0 or 16 <= row < 32 for row in range(num_rows)]
    layer.runs[:, :num_rows] = torch.tensor([not one for one in skips], dtype=torch.int32)
    running = [row for row in range(num_rows) if not skips[row]]
    found = layer.found(thresholds)
    assert torch.equal(found[skips], layer.h[skips])
    layer_of_running = layer.h[running]
    expected, counts = feed_forward_neurons(
        layer.block, layer_of_running, [thresholds[row] for row in running], is_joint=is_joint
    )
    close(found[running], expected)
    layer.assert_counts_are(counts.of_rows(running, num_rows))


@torch.inference_mode()
def test_of_equal_scores_none_goes_and_what_is_no_number_stays(
    tmp_path: Path, device: torch.device
) -> None:
    layer = Layer(tmp_path, device, 2, is_joint=True, has_bias=False)
    ffn = layer.block.ffn
    ffn.gate_up.weight[1:40] = ffn.gate_up.weight[0]  # forty neurons alike
    ffn.gate_up.weight[INNER + 1 : INNER + 40] = ffn.gate_up.weight[INNER]
    ffn.measure_down()
    ffn.down_norms[:40] = 1e-3  # and they are the lowest
    ffn.down_norms[40] = torch.nan
    high = 1e-3 + float(ffn.gate_up.weight.abs().sum())
    # One row would leave out all, the other none: half of them go, but that the lowest are alike.
    thresholds = [(high, 0.0), (0.0, 1e-30)]
    expected, counts = layer.expected(thresholds)
    close(layer.found(thresholds), expected)
    layer.assert_counts_are(counts)
    assert layer.rows.neuron_counts[:2, LAYER, 0].tolist() == [0, 0]


@pytest.mark.parametrize("tiles", [tiles, down_tile_for], ids=["parts", "default"])
@pytest.mark.parametrize("run", [[1], [1, 0, 1], [1] * 17])
@torch.inference_mode()
def test_the_dense_product_is_torchs(
    run: list[int], tiles: Tiles, tmp_path: Path, device: torch.device
) -> None:
    num_rows = len(run)
    layer = Layer(tmp_path, device, num_rows)
    act = normal(num_rows, INNER, dtype=torch.float32, device=device)
    flags = torch.tensor(run, dtype=torch.int32, device=device)
    h = layer.h.clone()
    parts = parts_for(num_rows, HIDDEN, device).fill_(torch.nan)
    down(act, layer.block.ffn.down, h, num_rows, parts, run=flags, tiles=tiles)
    expected = layer.h + layer.block.ffn.down(act)
    for row, runs in enumerate(run):
        close(h[row], expected[row] if runs else layer.h[row])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 4096, 11008), (256, 32, 32)),
        ((8, 4096, 11008), (64, 64, 8)),
        ((1, 576, 1536), (256, 32, 12)),
        ((1, 32, 64), (32, 32, 1)),
    ],
)
def test_many_programs_share_the_neurons_of_a_wide_model(
    shape: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    tile = down_tile_for(*shape)
    assert (tile.block_n, tile.block_k, tile.splits) == expected
