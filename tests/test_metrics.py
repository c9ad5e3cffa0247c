import re
from collections.abc import Callable
from typing import Any

import pytest

from server.metrics import Metrics
from skipllm_core.types import EngineHealth, EngineInfo, SeqOutput, SkipUsage, StepStats
from tests.fakes import FakeRunner, fake_engine

DESIGN = [
    "request_skip_ratio",
    "ffn_blocks_total",
    "ffn_neurons_total",
    "ffn_weight_reads_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "request_latency_seconds",
    "request_queue_seconds",
    "prompt_tokens_total",
    "generated_tokens_total",
    "requests_total",
    "requests_running",
    "requests_waiting",
    "kv_cache_usage_ratio",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "preemptions_total",
    "engine_up",
    "engine_host_seconds_total",
    "engine_step_seconds",
    "build_info",
]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def info(num_layers: int) -> EngineInfo:
    return fake_engine(FakeRunner(num_layers=num_layers)).info


class FakeEngine:
    """What the metrics look at in an engine."""

    def __init__(self) -> None:
        self.info = info(num_layers=3)
        self.on_step: list[Callable[[StepStats], None]] = []
        self.num_unfinished = 0
        self.state: Any = "ready"

    def health(self) -> EngineHealth:
        return EngineHealth(self.state)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics("demo", clock=clock)


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(f"skipllm_{name}", labels)
    assert found is not None, f"{name}{labels} does not exist"
    return found


def series(metrics: Metrics) -> set[str]:
    lines = metrics.render().decode().splitlines()
    return {line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")}


def decode_step(**changes: Any) -> StepStats:
    fields: dict[str, Any] = {
        "kind": "decode",
        "duration_s": 0.004,
        "num_running": 2,
        "num_waiting": 1,
        "num_kv_blocks_used": 3,
        "num_kv_blocks": 12,
        "ffn_computed": (2, 2, 1),
        "ffn_skipped": (0, 0, 1),
        "ffn_weight_reads": 3,
    }
    return StepStats(**fields | changes)


def test_every_metric_of_the_design_exists_before_the_first_request(metrics: Metrics) -> None:
    metrics.set_shape(info(3))
    text = metrics.render().decode()
    for name in DESIGN:
        assert re.search(rf"^skipllm_{name}(_count)?(\{{.*\}})? ", text, re.MULTILINE), name
    assert value(metrics, "ffn_blocks_total", layer="2", outcome="skipped") == 0
    assert (
        value(metrics, "requests_total", endpoint="chat", status="200", finish_reason="stop") == 0
    )


def test_requests_of_p_and_g_tokens_count_exactly(metrics: Metrics, clock: Clock) -> None:
    num_requests, num_prompt, num_generated = 3, 7, 5
    for seq_id in range(num_requests):
        request = metrics.request("chat")
        request.submitted(num_prompt)
        for index in range(num_generated):
            clock.now_s += 0.5 if index == 0 else 0.01
            request.output(SeqOutput(seq_id=seq_id, token_ids=(1,)))
        request.finished(200, "length")
    assert value(metrics, "time_to_first_token_seconds_count") == 3
    assert value(metrics, "time_to_first_token_seconds_sum") == pytest.approx(3 * 0.5)
    assert value(metrics, "inter_token_latency_seconds_count") == 3 * 4
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(3 * 4 * 0.01)
    assert value(metrics, "time_per_output_token_seconds_sum") == pytest.approx(3 * 0.01)
    assert value(metrics, "request_latency_seconds_sum") == pytest.approx(3 * 0.54)
    assert value(metrics, "prompt_tokens_total") == 3 * 7
    assert value(metrics, "generated_tokens_total") == 3 * 5
    labels = {"endpoint": "chat", "status": "200", "finish_reason": "length"}
    assert value(metrics, "requests_total", **labels) == 3


def test_a_message_of_several_tokens_is_spread_over_its_gap(metrics: Metrics, clock: Clock) -> None:
    request = metrics.request("chat")
    request.output(SeqOutput(seq_id=0, token_ids=(1, 2)))
    clock.now_s += 0.084
    request.output(SeqOutput(seq_id=0, token_ids=(3, 4, 5)))
    request.output(SeqOutput(seq_id=0, finish_reason="abort"))
    assert value(metrics, "inter_token_latency_seconds_count") == 4
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.084)
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.02") == 1
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.03") == 4


def test_a_request_with_two_answers_has_one_first_token_and_gaps_of_each(
    metrics: Metrics, clock: Clock
) -> None:
    request = metrics.request("completions")
    for _ in range(3):
        clock.now_s += 0.1
        for seq_id in (0, 1):
            request.output(SeqOutput(seq_id=seq_id, token_ids=(1,)))
    for seq_id, skipped in ((0, 2), (1, 4)):
        usage = SkipUsage(skipped_ffn_rows=skipped, total_ffn_rows=12)
        request.output(SeqOutput(seq_id=seq_id, finish_reason="stop", skip_usage=usage))
    request.finished(200, "stop")
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 4
    assert value(metrics, "time_per_output_token_seconds_count") == 2
    assert value(metrics, "request_skip_ratio_count") == 1
    assert value(metrics, "request_skip_ratio_sum") == pytest.approx(0.25)
    assert value(metrics, "request_skip_ratio_bucket", le="0.2") == 0
    assert value(metrics, "request_skip_ratio_bucket", le="0.25") == 1


def test_only_the_first_end_of_a_request_counts(metrics: Metrics) -> None:
    request = metrics.request("chat")
    request.finished(499, "abort")
    request.finished(200, "stop")
    labels = {"endpoint": "chat", "status": "499", "finish_reason": "abort"}
    assert value(metrics, "requests_total", **labels) == 1
    assert value(metrics, "request_latency_seconds_count") == 0
    assert value(metrics, "request_skip_ratio_count") == 0


def test_a_step_counts_its_rows_per_layer_and_its_weight_reads(metrics: Metrics) -> None:
    metrics.set_shape(info(3))
    metrics.observe_step(decode_step())
    metrics.observe_step(
        decode_step(
            ffn_computed=(1, 1, 0),
            ffn_skipped=(0, 0, 1),
            ffn_weight_reads=1.75,
            ffn_weight_reads_avoided=1.25,
            num_preemptions=1,
        )
    )
    assert value(metrics, "ffn_blocks_total", layer="0", outcome="computed") == 3
    assert value(metrics, "ffn_blocks_total", layer="2", outcome="skipped") == 2
    assert value(metrics, "ffn_weight_reads_total", outcome="read") == 4.75
    assert value(metrics, "ffn_weight_reads_total", outcome="avoided") == 1.25
    assert value(metrics, "engine_step_seconds_count", kind="decode") == 2
    assert value(metrics, "preemptions_total") == 1


def test_every_neuron_of_a_counted_token_has_one_outcome(metrics: Metrics) -> None:
    engine = FakeEngine()
    metrics.watch(engine)  # type: ignore[arg-type]
    (on_step,) = engine.on_step
    on_step(decode_step())  # nobody leaves out neurons
    on_step(
        decode_step(
            ffn_computed=(2, 2, 1),
            ffn_skipped=(0, 0, 1),
            neurons_skipped_before_up=(5, 0, 1),
            neurons_skipped_before_down=(3, 2, 0),
        )
    )

    def of_layer(layer: int) -> list[float]:
        outcomes = ("computed", "skipped_before_up", "skipped_before_down", "skipped_with_block")
        return [
            value(metrics, "ffn_neurons_total", layer=str(layer), outcome=outcome)
            for outcome in outcomes
        ]

    assert of_layer(0) == [4 * 16 - 8, 5, 3, 0]
    assert of_layer(1) == [4 * 16 - 2, 0, 2, 0]
    assert of_layer(2) == [2 * 16 - 1, 1, 0, 2 * 16]


def test_prefix_cache_counts_are_tokens(metrics: Metrics) -> None:
    for num_queries, num_hits in ((40, 0), (40, 32), (0, 0)):
        metrics.observe_step(
            StepStats(
                kind="prefill",
                duration_s=0.01,
                num_running=1,
                num_waiting=0,
                num_kv_blocks_used=3,
                num_kv_blocks=12,
                num_prefix_cache_queries=num_queries,
                num_prefix_cache_hits=num_hits,
            )
        )
    assert value(metrics, "prefix_cache_queries_total") == 80
    assert value(metrics, "prefix_cache_hits_total") == 32


def test_gauges_follow_the_engine_and_fall_to_zero_after_aborts(metrics: Metrics) -> None:
    engine = FakeEngine()
    metrics.watch(engine)  # type: ignore[arg-type]
    assert value(metrics, "requests_running") == 0
    engine.num_unfinished = 3
    (on_step,) = engine.on_step
    on_step(decode_step())
    assert value(metrics, "requests_running") == 2
    assert value(metrics, "requests_waiting") == 1
    assert value(metrics, "kv_cache_usage_ratio") == 0.25
    engine.num_unfinished = 0  # all aborted, and no step since
    assert value(metrics, "requests_running") == 0
    assert value(metrics, "requests_waiting") == 0
    assert value(metrics, "kv_cache_usage_ratio") == 0


def test_engine_up_is_asked_at_every_scrape(metrics: Metrics) -> None:
    engine = FakeEngine()
    metrics.watch(engine)  # type: ignore[arg-type]
    assert value(metrics, "engine_up") == 1
    engine.state = "restarting"
    assert value(metrics, "engine_up") == 0


def test_usual_traffic_makes_no_new_series(metrics: Metrics) -> None:
    metrics.set_shape(info(3))
    before = series(metrics)
    for seq_id in range(20):
        request = metrics.request("chat")
        request.submitted(3)
        request.output(SeqOutput(seq_id=seq_id, token_ids=(1,), queue_s=0.1))
        request.finished(200, "stop")
    metrics.observe_step(decode_step())
    metrics.request("completions").finished(400)
    assert series(metrics) == before
