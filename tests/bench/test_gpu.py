"""`skipllm bench gpu` as far as it goes without one: arithmetic, and the plan, interpreted."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from skipllm_core.bench import gpu, gpu_plan
from skipllm_core.bench.gpu import Fit, StepBench, empty_kernel_us, linear_gb_per_s, spread_triggers
from skipllm_core.bench.gpu_plan import GpuMeasurement, Plan, Told, measure_plan
from skipllm_core.bench.gpu_report import gpu_table
from skipllm_core.kernels.gpu.linear import Tile
from skipllm_core.model.llama import LlamaModel
from skipllm_core.model.loader import load_model
from skipllm_core.runner.graphs import direct
from tests.runner.tiny import write_config

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted")


def tiles(num_rows: int, num_outputs: int, num_inputs: int) -> Tile:
    return Tile(block_n=128, block_k=64)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaModel:
    monkeypatch.setattr(gpu, "NUM_ROUNDS", 1)
    monkeypatch.setattr(gpu, "EMPTY_LAUNCHES", 2)
    write_config(tmp_path, num_hidden_layers=4)
    return load_model(tmp_path, device=CPU, dtype=torch.float32, load_format="dummy")


def test_the_fit_is_the_line_through_what_was_measured() -> None:
    fit = Fit.of([0, 4, 8, 10], [3.5, 3.26, 3.02, 2.9])
    assert fit.full_ms == pytest.approx(3.5)
    assert fit.block_ms == pytest.approx(0.06)
    assert fit.max_residual_ms == pytest.approx(0, abs=1e-9)


def test_triggers_scatter_within_what_may_be_skipped_and_alike_every_time() -> None:
    skipped = spread_triggers(64, 20)
    assert skipped == spread_triggers(64, 20)
    assert min(skipped) >= 0
    assert max(skipped) <= 20
    assert len(set(skipped)) > 3
    assert 14 < sum(skipped) / 64 < 18


@pytest.mark.parametrize("batch", [1, 3])
def test_forced_rows_skip_exactly_what_they_are_told(model: LlamaModel, batch: int) -> None:
    with torch.inference_mode():
        bench = StepBench(model, batch=batch, context=5, capture=direct, tiles=tiles)
        assert bench.forced([2, 1, 0][:batch], 1) > 0
        assert bench.rows.skipped.sum(dim=1).tolist() == [2, 1, 0][:batch]
        assert bench.rows.num_needed.tolist() == ([1, 0, 0, 1] if batch == 1 else [3, 2, 1, 3])
        assert bench.gate_alone(1) > 0
        assert not bench.rows.skipped.any(), "the gate alone skips nothing"
        assert bench.never(1) > 0
        assert bench.rows.logits.isfinite().all()


def test_linears_and_the_empty_kernel_are_timed(model: LlamaModel) -> None:
    with torch.inference_mode():
        found = linear_gb_per_s(model, 2, direct)
        assert found.keys() == {"qkv", "o", "gate_up", "down"}
        assert min(found.values()) > 0
        assert empty_kernel_us(model, 1, direct) > 0


def test_the_plan_measures_every_case_and_tells_what_it_left_out(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plan, "load_shape", lambda *_: model)
    plan = Plan(
        shapes=["163m", "llama-2-7b"],
        batches=[2],
        contexts=[3],
        forced_skips=[0, 2, 99],
        budget_s=1.5,
        num_replays=1,
    )
    clock = itertools.count()  # a second for each look at it: one case, and no more
    found = list(
        measure_plan(
            plan,
            device=CPU,
            dtype=torch.float32,
            bytes_per_s=1e9,
            make_capture=lambda: direct,
            clock=lambda: float(next(clock)),
            tiles=tiles,
        )
    )
    rows = [item for item in found if isinstance(item, GpuMeasurement)]
    told = [item.text for item in found if isinstance(item, Told)]
    assert [row.policy for row in rows] == ["never", "gate only", "forced", "forced", "mixed"]
    assert [row.forced_skip for row in rows[:4]] == [None, None, 0, 2]
    assert rows[3].token_skip_ratio == rows[3].weight_skip_ratio == 0.5
    assert rows[0].speedup_vs_never == 1.0
    assert any("blocks skipped, off by" in text for text in told)
    assert gpu_table(rows).row_count == 5
    assert told[-1] == "left out, as the time is used up: llama-2-7b, none, batch 2, context 3"
