"""What the server tells Prometheus, and the log line of each request.

Labels come from closed sets: nothing that a client sends is one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

from server.ffn_metrics import FfnMetrics
from skipllm_core.client import EngineClient
from skipllm_core.types import (
    EngineInfo,
    FinishReason,
    SeqOutput,
    SkipUsage,
    StepKind,
    StepStats,
    total_skip_usage,
)

logger = logging.getLogger(__name__)

Endpoint = Literal["chat", "completions", "responses", "messages"]
FinishLabel = FinishReason | Literal["none"]  # none: the request never reached the engine

# Fine enough to tell two fast GPUs apart: one millisecond is a whole decode step there.
_TOKEN_BUCKETS_S = (
    0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5,
)  # fmt: skip
_WAIT_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1, 1.5, 2.5, 5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300,
)  # fmt: skip
_RATIO_BUCKETS = tuple(round(0.05 * step, 2) for step in range(21))

# (status, finish_reason) pairs whose series exist from the start, so that rates begin at 0.
_REFUSALS = (400, 401, 404, 405, 408, 413, 414, 415, 431, 499, 500, 503)
_USUAL_ENDINGS: tuple[tuple[int, FinishLabel], ...] = (
    (200, "stop"),
    (200, "length"),
    (200, "error"),
    *((status, "none") for status in _REFUSALS),
    (499, "abort"),
    (500, "error"),
    (503, "error"),
)
_IDLE = StepStats(
    kind="decode",
    duration_s=0.0,
    num_running=0,
    num_waiting=0,
    num_kv_blocks_used=0,
    num_kv_blocks=1,
)


class Metrics:
    """The server's own registry. One per application; the event loop alone writes to it."""

    def __init__(self, model: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        registry = self.registry
        ProcessCollector(registry=registry)

        # Skipping.
        self.skip_ratio = Histogram(
            "skipllm_request_skip_ratio",
            "Share of the FFN weights that a request's tokens left out, as usage.skip tells it.",
            buckets=_RATIO_BUCKETS,
            registry=registry,
        )
        self._ffn = FfnMetrics()
        registry.register(self._ffn)
        reads = Counter(
            "skipllm_ffn_weight_reads_total",
            "FFN weights that decode steps read, or avoided as no row wanted them: 1 of a whole "
            "layer, a fraction of some of its neurons.",
            ["outcome"],
            registry=registry,
        )
        self._weight_reads = reads.labels("read")
        self._weight_reads_avoided = reads.labels("avoided")

        # Latency and throughput, as the HTTP side sees them.
        def latency(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"skipllm_{name}_seconds", text, buckets=buckets, registry=registry)

        self.ttft = latency(
            "time_to_first_token", "Request received to its first token.", _WAIT_BUCKETS_S
        )
        self.itl = latency(
            "inter_token_latency", "Between two tokens of a sequence.", _TOKEN_BUCKETS_S
        )
        self.tpot = latency(
            "time_per_output_token",
            "A finished sequence's mean time per token after the first.",
            _TOKEN_BUCKETS_S,
        )
        self.latency = latency(
            "request_latency", "Request received to its end, if it was served.", _REQUEST_BUCKETS_S
        )
        self.queue = latency(
            "request_queue", "Sequence submitted to its first scheduling.", _WAIT_BUCKETS_S
        )
        self.prompt_tokens = Counter(
            "skipllm_prompt_tokens_total", "Prompt tokens of accepted requests.", registry=registry
        )
        self.generated_tokens = Counter(
            "skipllm_generated_tokens_total", "Tokens generated.", registry=registry
        )
        self._requests = Counter(
            "skipllm_requests_total",
            "Requests by endpoint, HTTP status (499: the client left) and finish reason.",
            ["endpoint", "status", "finish_reason"],
            registry=registry,
        )
        for endpoint in get_args(Endpoint):
            for status, finish_reason in _USUAL_ENDINGS:
                self._requests.labels(endpoint, str(status), finish_reason)

        # The engine.
        self._running = Gauge(
            "skipllm_requests_running", "Sequences being computed.", registry=registry
        )
        self._waiting = Gauge("skipllm_requests_waiting", "Sequences queued.", registry=registry)
        self._kv_cache_usage = Gauge(
            "skipllm_kv_cache_usage_ratio", "Share of KV cache blocks in use.", registry=registry
        )
        self._host_seconds = Counter(
            "skipllm_engine_host_seconds",
            "Time the engine took to schedule and launch steps beside a GPU that computes.",
            registry=registry,
        )
        self._engine_up = Gauge(
            "skipllm_engine_up", "1 while the engine is ready.", registry=registry
        )
        self._preemptions = Counter(
            "skipllm_preemptions_total",
            "Sequences whose blocks were taken back, to be recomputed.",
            registry=registry,
        )
        self._prefix_cache_queries = Counter(
            "skipllm_prefix_cache_queries_total",
            "Prompt tokens that were looked up in the prefix cache.",
            registry=registry,
        )
        self._prefix_cache_hits = Counter(
            "skipllm_prefix_cache_hits_total",
            "Prompt tokens that were found in the prefix cache, and not computed.",
            registry=registry,
        )
        step_seconds = Histogram(
            "skipllm_engine_step_seconds",
            "Duration of an engine step.",
            ["kind"],
            buckets=_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._step_seconds = {kind: step_seconds.labels(kind) for kind in get_args(StepKind)}
        Gauge(
            "skipllm_build_info", "1, with what runs.", ["version", "model"], registry=registry
        ).labels(version("skipllm"), model).set(1)

    def watch(self, engine: EngineClient) -> None:
        """Follow `engine`: its steps as they come, its state whenever Prometheus asks.

        An abort frees a sequence without a step, so the last step's numbers are bounded by how
        many sequences there are now.
        """
        last = _IDLE

        def on_step(stats: StepStats) -> None:
            nonlocal last
            last = stats
            if not self._ffn.is_shaped:
                self.set_shape(engine.info)
            self.observe_step(stats)

        def num_running() -> int:
            return min(last.num_running, engine.num_unfinished)

        def kv_cache_usage() -> float:
            return last.num_kv_blocks_used / last.num_kv_blocks if engine.num_unfinished else 0.0

        engine.on_step.append(on_step)
        self._running.set_function(num_running)
        self._waiting.set_function(lambda: engine.num_unfinished - num_running())
        self._kv_cache_usage.set_function(kv_cache_usage)
        self._engine_up.set_function(lambda: engine.health().state == "ready")

    def set_shape(self, info: EngineInfo) -> None:
        """Make the series of every layer; called once the engine has told how many there are."""
        self._ffn.set_shape(info.num_layers, info.num_neurons)

    def observe_step(self, stats: StepStats) -> None:
        self._step_seconds[stats.kind].observe(stats.duration_s)
        self._host_seconds.inc(stats.host_s)
        self._preemptions.inc(stats.num_preemptions)
        self._prefix_cache_queries.inc(stats.num_prefix_cache_queries)
        self._prefix_cache_hits.inc(stats.num_prefix_cache_hits)
        self._weight_reads.inc(stats.ffn_weight_reads)
        self._weight_reads_avoided.inc(stats.ffn_weight_reads_avoided)
        self._ffn.add(stats)

    def request(self, endpoint: Endpoint, request_id: str = "") -> RequestMetrics:
        """The recorder of a request that has just been received. The id is for the log alone."""
        return RequestMetrics(self, endpoint, request_id)

    def count_request(self, endpoint: Endpoint, status: int, finish_reason: FinishLabel) -> None:
        self._requests.labels(endpoint, str(status), finish_reason).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format (version 0.0.4)."""
        return generate_latest(self.registry)


class RequestMetrics:
    """What one request adds to the metrics, from its arrival (construction) to `finished`."""

    def __init__(self, metrics: Metrics, endpoint: Endpoint, request_id: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._request_id = request_id
        self._arrival_s = metrics.clock()
        self._ttft_s: float | None = None
        self._num_prompt_tokens = 0
        self._sequences: dict[int, _SequenceTimes] = {}
        self._skip_usages: dict[int, SkipUsage] = {}  # per sequence, so far
        self._is_finished = False

    def submitted(self, num_prompt_tokens: int) -> None:
        """The engine took the request, with this many prompt tokens over all its prompts."""
        self._num_prompt_tokens += num_prompt_tokens
        self._metrics.prompt_tokens.inc(num_prompt_tokens)

    def output(self, output: SeqOutput) -> None:
        """One message of the engine for one of the request's sequences, as it is read."""
        metrics = self._metrics
        now_s = metrics.clock()
        if output.queue_s is not None:
            metrics.queue.observe(output.queue_s)
        if output.skip_usage is not None:
            self._skip_usages[output.seq_id] = output.skip_usage
        num_tokens = len(output.token_ids)
        if not num_tokens:
            return
        metrics.generated_tokens.inc(num_tokens)
        times = self._sequences.get(output.seq_id)
        if times is None:
            if self._ttft_s is None:
                self._ttft_s = now_s - self._arrival_s
                metrics.ttft.observe(self._ttft_s)
            times = self._sequences[output.seq_id] = _SequenceTimes(now_s)
            num_gaps, gap_s = num_tokens - 1, 0.0  # they came together
        else:
            num_gaps, gap_s = num_tokens, (now_s - times.last_s) / num_tokens
        for _ in range(num_gaps):  # a message of k tokens is k gaps, so that counts stay true
            metrics.itl.observe(gap_s)
        times.last_s = now_s
        times.num_tokens += num_tokens

    def finished(
        self,
        status: int,
        finish_reason: FinishLabel = "none",
        error: str | None = None,
        *,
        num_cached_tokens: int = 0,
    ) -> None:
        """The request's end, whatever it was; `error` is what the client was told, for the log.
        Only the first call counts."""
        if self._is_finished:
            return
        self._is_finished = True
        metrics = self._metrics
        metrics.count_request(self._endpoint, status, finish_reason)
        latency_s = metrics.clock() - self._arrival_s
        skipped_ffn_share = total_skip_usage(self._skip_usages.values()).skipped_ffn_share
        if finish_reason in ("stop", "length"):
            metrics.latency.observe(latency_s)
            metrics.skip_ratio.observe(skipped_ffn_share)
            for times in self._sequences.values():
                if times.num_tokens > 1:
                    metrics.tpot.observe((times.last_s - times.first_s) / (times.num_tokens - 1))
        facts = {
            "request_id": self._request_id,
            "endpoint": self._endpoint,
            "status": status,
            "finish_reason": finish_reason,
            "prompt_tokens": self._num_prompt_tokens,
            "cached_tokens": num_cached_tokens,
            "generated_tokens": sum(times.num_tokens for times in self._sequences.values()),
            "ttft_s": None if self._ttft_s is None else round(self._ttft_s, 4),
            "latency_s": round(latency_s, 4),
            "skipped_ffn_share": round(skipped_ffn_share, 4),
            "error": error,
        }
        logger.info("request", extra=facts)


class _SequenceTimes:
    """When a sequence's first and latest tokens were read, and how many there were."""

    __slots__ = ("first_s", "last_s", "num_tokens")

    def __init__(self, first_s: float) -> None:
        self.first_s = first_s
        self.last_s = first_s
        self.num_tokens = 0
