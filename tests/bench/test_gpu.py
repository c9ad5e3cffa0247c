"""`skipllm bench gpu` as far as it goes without one: arithmetic, and the plan, interpreted."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from skipllm_core.bench.gpu import case as gpu_case
from skipllm_core.bench.gpu import parts as gpu_parts
from skipllm_core.bench.gpu import plan as gpu_plan
from skipllm_core.bench.gpu import steps
from skipllm_core.bench.gpu.if_nodes import IfNodeDecoder, has_if_nodes
from skipllm_core.bench.gpu.measurement import GpuMeasurement, Told
from skipllm_core.bench.gpu.parts import empty_kernel_us, linear_gb_per_s
from skipllm_core.bench.gpu.plan import Plan, PlanBench
from skipllm_core.bench.gpu.report import gpu_table
from skipllm_core.bench.gpu.steps import Fit, StepBench
from skipllm_core.bench.gpu.triggers import TriggerSpread
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
    monkeypatch.setattr(steps, "NUM_ROUNDS", 1)
    monkeypatch.setattr(steps, "NUM_BISECTIONS", 4)
    monkeypatch.setattr(gpu_parts, "EMPTY_LAUNCHES", 2)
    monkeypatch.setattr(gpu_case, "MOST_VARYING_STEPS", 2)
    monkeypatch.setattr(gpu_case, "LEAST_VARYING_STEPS", 2)
    monkeypatch.setattr(gpu_case, "NEURON_SHARES", ((0.0, 0.0), (0.5, 0.0)))
    write_config(tmp_path, num_hidden_layers=4)
    return load_model(tmp_path, device=CPU, dtype=torch.float32, load_format="dummy")


def test_the_fit_is_the_line_through_what_was_measured() -> None:
    fit = Fit.of([0, 4, 8, 10], [3.5, 3.26, 3.02, 2.9])
    assert fit.full_ms == pytest.approx(3.5)
    assert fit.block_ms == pytest.approx(0.06)
    assert fit.max_residual_ms == pytest.approx(0, abs=1e-9)


def test_triggers_scatter_as_their_distribution_says_and_alike_every_time() -> None:
    spread = TriggerSpread(8, 28)
    steps = spread.draw(8, 4000)
    assert steps == spread.draw(8, 4000)
    for count in (0, 1, 6, 8, 11, 29):
        share = sum(skipped >= count for step in steps for skipped in step) / 32000
        assert share == pytest.approx(spread.at_least(count), abs=0.01)
    saved = sum(map(min, steps)) / 4000
    assert saved == pytest.approx(spread.expected_saved(8), abs=0.15)


def test_a_batch_saves_less_than_a_row() -> None:
    spread = TriggerSpread(8, 28)
    saved = [spread.expected_saved(batch) for batch in (1, 8, 32)]
    assert saved == pytest.approx([7.84, 4.4, 2.1], abs=0.2)
    assert TriggerSpread(8, 4, never=0.0).expected_saved(1) == pytest.approx(4, abs=0.1)


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


@torch.inference_mode()
def test_the_thresholds_that_are_found_leave_out_what_was_asked_for(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "NUM_BISECTIONS", 9)
    bench = StepBench(model, batch=1, context=5, capture=direct, tiles=tiles)
    found = bench.neurons((0.25, 0.0), 1)
    assert found.mean == found.joint == pytest.approx(4 * 0.25 * 2 / 3, abs=0.1), "in blocks of 4"
    counts = bench.rows.neuron_counts[0, :, 0].tolist()
    assert counts == pytest.approx([24] * 4, abs=7), "of 96, in each layer"


class FakeGraph:
    """Says who was captured behind a node, and whether the node would have run it."""

    current: FakeGraph

    def __init__(self) -> None:
        FakeGraph.current = self
        self.nodes: list[bool] = []
        self.depth = 0

    @staticmethod
    def get_currently_capturing_graph() -> FakeGraph:
        return FakeGraph.current

    def begin_capture_to_if_node(self, condition: torch.Tensor) -> None:
        assert (condition.dtype, condition.shape) == (torch.bool, ())
        self.depth += 1
        self.nodes.append(bool(condition))

    def end_capture_to_conditional_node(self) -> None:
        self.depth -= 1


def test_an_if_node_stands_before_each_ffn_of_a_captured_step(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_if_nodes(), "torch without CUDA"
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert has_if_nodes()
    settings = {"batch": 2, "context": 5, "capture": direct, "tiles": tiles}
    with torch.inference_mode():
        torch.manual_seed(0)
        plain = StepBench(model, **settings)  # type: ignore[arg-type]
        torch.manual_seed(0)
        bench = StepBench(model, **settings, decoder_type=IfNodeDecoder)  # type: ignore[arg-type]
        graph = FakeGraph()
        bench.forced([1, 2], 1)
        assert graph.nodes == [], "not captured: predicated as ever"
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        bench._skip()
        assert graph.nodes == [True, True, False, True]
        assert graph.depth == 0
        bench._stock()
        assert len(graph.nodes) == 4, "nobody decides in a stock step"
        bench._skip()
        plain.forced([1, 2], 1)
        assert torch.equal(bench.rows.logits, plain.rows.logits)


def test_natural_thresholds_skip_about_what_is_asked_for(model: LlamaModel) -> None:
    with torch.inference_mode():
        bench = StepBench(model, batch=3, context=5, capture=direct, tiles=tiles)
        ms, skipped = bench.natural(0.5, 1)
        assert ms > 0
        assert skipped == bench.rows.skipped.sum(dim=1).tolist()
        assert sum(skipped) / 3 >= 0.5
        assert bench.natural(1, 1)[1] == [1, 1, 1], "as many as there are"


def test_steps_that_vary_each_have_their_own_mask(model: LlamaModel) -> None:
    with torch.inference_mode():
        bench = StepBench(model, batch=2, context=5, capture=direct, tiles=tiles)
        seen: list[list[int]] = []
        skip = bench._skip

        def spy() -> None:
            skip()
            seen.append(bench.rows.skipped.sum(dim=1).tolist())

        bench._skip = spy
        assert bench.varying([[1, 0], [2, 3]]) > 0
        assert seen[-2:] == [[1, 0], [2, 3]]


def test_linears_and_the_empty_kernel_are_timed(model: LlamaModel) -> None:
    with torch.inference_mode():
        found = linear_gb_per_s(model, 2, direct, tiles)
        assert found.keys() == {"qkv", "o", "gate_up", "down", "head"}
        assert min(found.values()) > 0
        assert empty_kernel_us(model, 1, direct, tiles) > 0


def plan_bench(plan: Plan, **more: Any) -> PlanBench:
    settings = {"make_capture": lambda: direct, "tiles": tiles, "bytes_per_s": 1e9}
    return PlanBench(plan, device=CPU, dtype=torch.float32, **settings | more)


@torch.inference_mode()
def test_the_plan_measures_every_case_and_tells_what_it_left_out(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plan, "load_shape", lambda *_: model)
    plan = Plan(
        shapes=["163m", "llama-2-7b"],
        batches=[2],
        contexts=[3],
        forced_skips=[0, 2, 99],
        budget_s=3.5,
        num_replays=1,
    )
    clock = itertools.count()  # a second for each look at it: one case, and no more
    found = list(plan_bench(plan, clock=lambda: float(next(clock))).items())
    rows = [item for item in found if isinstance(item, GpuMeasurement)]
    told = [item for item in found if isinstance(item, Told)]
    policies = ["never", "gate only", "forced", "forced", "ffn_skip", "mixed"]
    policies += ["neurons"] * 2 + ["neurons together"] * 2
    assert [row.policy for row in rows] == policies
    assert [row.skipped_blocks for row in rows[:4]] == [None, None, 0, 2]
    assert rows[3].token_skip_ratio == rows[3].weight_skip_ratio == 0.5
    assert rows[0].speedup_vs_never == 1.0
    fit = next(item.facts for item in told if "fit" in item.facts)
    saved = TriggerSpread(1, 3).expected_saved(2)
    assert rows[5].expected_saved_ms == pytest.approx(saved * float(fit["block_ms"]))
    assert rows[5].saved_ms is not None
    assert any("E[blocks saved]" in item.text for item in told)
    alone, together = rows[6:8], rows[8:]
    assert [row.token_skip_ratio for row in (alone[0], together[0])] == [0, 0]
    for row in (alone[1], together[1]):  # half the neurons at least, two of whose three rows go
        assert 0.3 < (row.token_skip_ratio or 0) <= 2 / 3
        assert row.expected_saved_ms is not None
    assert together[1].weight_skip_ratio == pytest.approx(together[1].token_skip_ratio)
    assert (alone[1].weight_skip_ratio or 0) < (together[1].weight_skip_ratio or 0)
    linears = [item.facts for item in told if "linears_gb_per_s" in item.facts]
    assert [facts["num_rows"] for facts in linears] == [2]
    assert any("empty_kernel" in item.facts for item in told)
    assert "torch 2" in told[0].text
    assert "no CUDA IF nodes" in told[0].text
    assert gpu_table(rows).row_count == 1
    assert told[-1].text == "left out, as the time is used up: llama-2-7b, none"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory does not suffice: "),
        (RuntimeError("CUDA error: invalid\nmore"), "it failed: "),
        (KeyError("tile"), "it failed: "),
    ],
)
@torch.inference_mode()
def test_a_case_that_fails_is_told_and_the_next_is_measured(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def make(model: LlamaModel, **settings: Any) -> StepBench:
        if settings["batch"] == 4:
            raise error
        return StepBench(model, **settings)

    monkeypatch.setattr(gpu_plan, "load_shape", lambda *_: model)
    monkeypatch.setattr(gpu_plan, "StepBench", make)
    monkeypatch.setattr(PlanBench, "_measure_linears", lambda *_: iter(()))
    plan = Plan(shapes=["163m"], batches=[4, 1], contexts=[3], forced_skips=[0], num_replays=1)
    found = list(plan_bench(plan).items())[1:]
    assert isinstance(found[0], Told)
    left_out = f"left out, as {reason}163m, none, batch 4, context 3"
    assert found[0].text.startswith(left_out)
    assert "more" not in found[0].text
    assert {row.batch for row in found[1:] if isinstance(row, GpuMeasurement)} == {1}


def test_a_device_that_answers_no_more_ends_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_plan, "load_shape", fail)
    monkeypatch.setattr(gpu_plan, "synchronize", fail)
    plan = Plan(shapes=["163m", "llama-2-7b"], batches=[1], contexts=[3], forced_skips=[0])
    told = [item.text for item in plan_bench(plan).items() if isinstance(item, Told)]
    assert len(told) == 3
    assert told[1].startswith("left out, as it failed: 163m, none: RuntimeError: CUDA error")
    assert "does not answer" in told[2]


def test_what_fails_in_transformers_is_told(
    monkeypatch: pytest.MonkeyPatch, model: LlamaModel
) -> None:
    def fail(*_: Any, is_static: bool) -> Any:
        raise ImportError("no such cache" if is_static else "no such model")

    monkeypatch.setattr(gpu_plan, "measure_transformers", fail)
    monkeypatch.setattr(PlanBench, "_measure_model", lambda *_: iter(()))
    plan = Plan(shapes=["163m"], batches=[1], contexts=[3], forced_skips=[0], compare=True)
    told = [item.text for item in plan_bench(plan).items() if isinstance(item, Told)]
    assert told[1].endswith("transformers eager, 163m: ImportError: no such model")
    assert told[2].endswith("transformers static, 163m: ImportError: no such cache")


def test_what_is_compiled_long_is_not_begun_late(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(
        gpu_plan, "measure_transformers", lambda *_, is_static: begun.append(is_static) or []
    )
    monkeypatch.setattr(PlanBench, "_measure_model", lambda *_: iter(()))
    plan = Plan(shapes=["163m"], batches=[1], contexts=[3], forced_skips=[0], compare=True)
    clock = iter([0.0, 440.0, 440.0, 440.0])  # of 480 s
    told = list(plan_bench(plan, clock=lambda: next(clock)).items())
    assert begun == [False]
    last = told[-1]
    assert isinstance(last, Told)
    assert last.text == "left out, as the time is used up: transformers static, 163m"


def test_the_bandwidth_is_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan, "copy_bytes_per_s", lambda _: 4e12)
    speeds = SimpleNamespace(bytes_per_s=3e12)
    monkeypatch.setattr(gpu_plan, "measure_read_bandwidth", lambda _: speeds)
    plan = Plan(shapes=[], batches=[1], contexts=[3], forced_skips=[0])
    first = next(iter(plan_bench(plan, bytes_per_s=None).items()))
    assert isinstance(first, Told)
    assert first.text == "memory: copies 4000 GB/s, reads 3000 GB/s"
    assert first.facts == {"copy_bytes_per_s": 4e12, "read_bytes_per_s": 3e12}


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
