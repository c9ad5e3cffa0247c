"""`skipllm bench gpu` as far as it goes without one: arithmetic, and the plan, interpreted."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("triton", reason="Triton has no build for this platform")

from server.cli import app
from skipllm_core.bench import gpu, gpu_plan
from skipllm_core.bench.gpu import Fit, StepBench, empty_kernel_us, linear_gb_per_s, spread_triggers
from skipllm_core.bench.gpu_plan import GpuMeasurement, Plan, Told, measure_plan
from skipllm_core.bench.gpu_report import draw, gpu_table
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


def test_a_case_that_runs_out_of_memory_is_left_out_and_the_next_is_measured(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(model: LlamaModel, **settings: Any) -> StepBench:
        if settings["batch"] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return StepBench(model, **settings)

    monkeypatch.setattr(gpu_plan, "load_shape", lambda *_: model)
    monkeypatch.setattr(gpu_plan, "StepBench", make)
    plan = Plan(shapes=["163m"], batches=[4, 1], contexts=[3], forced_skips=[0], num_replays=1)
    found = list(
        measure_plan(
            plan,
            device=CPU,
            dtype=torch.float32,
            bytes_per_s=1e9,
            make_capture=lambda: direct,
            tiles=tiles,
        )
    )
    left_out = "left out, as the memory does not suffice: 163m, none, batch 4, context 3"
    assert found[0] == Told(left_out)
    assert {row.batch for row in found[1:] if isinstance(row, GpuMeasurement)} == {1}


def test_memory_that_the_last_case_has_left_counts_as_free(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 2**30
    free = [1 * gib]  # the rest is in the cache of torch's allocator
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(60 * gib))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 80 * gib))
    on_cuda = SimpleNamespace(
        config=model.config,
        embedding=SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32),
    )
    token_bytes = 4 * 2 * 2 * 12 * 4  # layers, K and V, heads, head_dim, float32
    assert gpu_plan._fits(on_cuda, 64, 50 * gib // token_bytes // 64)  # type: ignore[arg-type]
    assert not gpu_plan._fits(on_cuda, 64, gib // 64 * 60 // token_bytes)  # type: ignore[arg-type]


def made_up_rows() -> list[GpuMeasurement]:
    def row(policy: Any, batch: int, skipped: float | None, ms: float, **more: Any) -> Any:
        return GpuMeasurement(
            model="llama-2-7b",
            device="cuda:0",
            dtype="bfloat16",
            policy=policy,
            batch=batch,
            forced_skip=skipped,
            ms_per_step=ms,
            tokens_per_s=batch / ms * 1e3,
            speedup_vs_never=3.5 / ms,
            token_skip_ratio=(skipped or 0) / 32,
            **{"quantization": "none", "context": 512} | more,
        )

    rows = [row("never", 1, None, 3.5), row("gate only", 1, None, 3.55)]
    rows += [row("forced", 1, k, 3.5 - 0.06 * k) for k in (0, 4, 8, 10)]
    rows += [row("forced", 8, k, 4.0 - 0.055 * k) for k in (0, 8)]
    rows += [row("mixed", 8, 6.5, 3.8)]
    rows += [row("forced", 1, k, 2.2 - 0.03 * k, quantization="int8") for k in (0, 8)]
    return [*rows, row("transformers eager", 1, None, 28.0)]


def test_the_plot_has_a_fit_per_batch_and_speedups_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    path = tmp_path / "steps.png"
    console = Console(file=io.StringIO())
    draw(made_up_rows(), path, "NVIDIA H200", console)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (figure,) = figures
    times, speedups, int8_times, _ = figure.axes
    assert times.get_title(loc="left") == "llama-2-7b, bfloat16, context 512"
    assert int8_times.get_title(loc="left") == "llama-2-7b, int8, context 512"
    labels = [text.get_text() for text in times.get_legend().get_texts()]
    assert labels == ["batch 1: 3.500 ms - 60.0 us k", "batch 8: 4.000 ms - 55.0 us k"]
    (fit, points) = times.get_lines()[:2]
    assert list(fit.get_xdata()) == [0, 10]
    assert list(fit.get_ydata()) == pytest.approx([3.5, 2.9])
    assert list(points.get_ydata()) == pytest.approx([3.5, 3.26, 3.02, 2.9])
    marks = {line.get_marker(): list(line.get_ydata()) for line in speedups.get_lines()[:4]}
    assert marks["D"] == pytest.approx([3.5 / 3.55])
    assert marks["s"] == pytest.approx([3.5 / 3.8])


def test_without_a_forced_skip_there_is_nothing_to_draw(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    draw(made_up_rows()[:2], tmp_path / "steps.png", "NVIDIA H200", console)
    assert not (tmp_path / "steps.png").exists()
    assert "is not written: no forced skip was measured" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_plot_that_cannot_be_written_is_told_before_anything_is_measured() -> None:
    result = CliRunner().invoke(app, ["bench", "gpu", "--plot", "/nowhere/at/all.png"])
    assert result.exit_code != 0
    assert "cannot write /nowhere/at/all.png" in result.output
