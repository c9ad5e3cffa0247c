"""The results of `skipllm bench serve` as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_LATENCIES = (
    ("ttft_ms", "TTFT", "time to first token"),
    ("itl_ms", "ITL", "between two chunks"),
    ("tpot_ms", "TPOT", "per token after the first"),
    ("e2el_ms", "E2EL", "whole request"),
)
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
_MAX_LAG_MS = 10  # from which a client's lateness is worth a warning


def print_report(result: Mapping[str, Any], console: Console) -> None:
    facts = Table.grid(padding=(0, 2))
    for label, fact in _facts(result):
        facts.add_row(label, Text(fact))
    console.print(facts)
    if result["num_ok"]:
        console.print(_latencies(result))
    if result["errors"]:
        errors = Table("error", "count", "example")
        for name, error in result["errors"].items():
            errors.add_row(name, str(error["count"]), Text(error["example"]))
        console.print(errors)
    for warning in _warnings(result):
        console.print(Text(f"note: {warning}"))


def _facts(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    settings = result["settings"]
    yield "model", f"{result['model']} at {result['base_url']}{settings['endpoint']}"
    if "request_rate" in settings:
        yield "load", f"open loop, {settings['request_rate']:g} requests/s (Poisson)"
    else:
        num = settings["max_concurrency"]
        yield "load", f"closed loop, {num} request{'s' * (num != 1)} at once"
    yield "requests", f"{result['num_ok']} ok, {result['num_failed']} failed"
    yield "duration", f"{result['duration_s']:.2f} s"
    yield "tokens", f"{result['num_prompt_tokens']} prompt, {result['num_output_tokens']} output"
    yield (
        "throughput",
        f"{result['output_tokens_per_s']:.1f} output tokens/s, "
        f"{result['total_tokens_per_s']:.1f} with prompts; "
        f"{result['requests_per_s']:.2f} requests/s",
    )
    if result["slos_ms"]:
        bounds = ", ".join(f"{name} <= {ms:g} ms" for name, ms in result["slos_ms"].items())
        share = result["num_good"] / (result["num_ok"] + result["num_failed"])
        yield (
            "goodput",
            f"{result['goodput_requests_per_s']:.2f} requests/s ({share:.0%} had {bounds})",
        )
    skipping = [
        f"{name} {result[name]:.3f}"
        for name in ("skipped_ffn_share", "token_skip_ratio", "weight_skip_ratio")
        if result[name] is not None
    ]
    if skipping:
        yield "skipping", ", ".join(skipping)
    if result["cached_token_ratio"]:
        yield "cached", f"{result['cached_token_ratio']:.1%} of the prompt tokens"
    if (use := result["engine_time_ratio"]) is not None:
        kinds = ", ".join(f"{kind} {ratio:.1%}" for kind, ratio in use.items())
        yield "engine", f"computing {sum(use.values()):.1%} of the time ({kinds})"


def _latencies(result: Mapping[str, Any]) -> Table:
    table = Table("latency (ms)", *(Column(name, justify="right") for name in _COLUMNS))
    for key, name, meaning in _LATENCIES:
        if (found := result[key]) is not None:
            table.add_row(f"{name}, {meaning}", *(_rounded(found[column]) for column in _COLUMNS))
    return table


def _rounded(value: float) -> str:
    """To three digits or to whole numbers, whichever is finer."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _warnings(result: Mapping[str, Any]) -> Iterator[str]:
    if result["is_interrupted"]:
        yield "interrupted; requests that were under way do not count"
    if result["num_without_usage"]:
        yield "the server told no usage: every chunk with text was counted as one token"
    if (result["cached_token_ratio"] or 0) > 0.5 and "input_len" in result["settings"]:
        yield "the server has seen these prompts before; another --seed draws others"
    lag = result["client_lag_ms"]["p99"]
    if lag > _MAX_LAG_MS:
        yield (
            f"this client was late itself (p99 {lag:.0f} ms): latencies include it, and say less "
            "of the server than they seem to"
        )
