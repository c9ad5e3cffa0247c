"""The arithmetic of `skipllm bench serve`, by hand, and when requests are sent."""

import asyncio
import time
from itertools import pairwise

import pytest

from skipllm_core.bench.latency import RequestRecord, distribution, summarize
from skipllm_core.bench.load import closed_loop, open_loop, poisson_arrivals


def make_record(
    *chunks_s: float,
    intended_s: float = 0.0,
    sent_s: float = 0.0,
    ended_s: float | None = None,
    num_output_tokens: int | None = None,
) -> RequestRecord:
    record = RequestRecord(intended_s, sent_s)
    for chunk_s in chunks_s:
        record.add_chunk(chunk_s)
    record.ended_s = chunks_s[-1] if ended_s is None else ended_s
    record.usage_output_tokens = num_output_tokens
    return record


def make_failure(error: str, message: str) -> RequestRecord:
    record = RequestRecord(0.0, 0.0)
    record.fail(error, message)
    record.ended_s = 0.1
    return record


def test_latencies_count_from_when_a_request_was_to_be_sent() -> None:
    record = make_record(3.0, 3.5, 4.5, intended_s=1.0, sent_s=2.5, ended_s=5.0)
    assert record.lag_s == 1.5
    assert record.ttft_s == 2.0
    assert record.e2el_s == 4.0
    assert record.gaps_s == [0.5, 1.0]


def test_time_per_output_token_spreads_the_time_after_the_first_over_the_others() -> None:
    chunks_s = (1.0, 1.5, 2.0)
    assert make_record(*chunks_s).tpot_s == 0.5  # one token a chunk, as no usage was told
    assert make_record(*chunks_s, num_output_tokens=5).tpot_s == 0.25
    # Its last two tokens had no text.
    assert make_record(*chunks_s, ended_s=3.0, num_output_tokens=5).tpot_s == 0.5


def test_time_per_output_token_of_one_chunk_is_not_known() -> None:
    assert make_record(1.0).tpot_s is None
    assert make_record(1.0, num_output_tokens=8).tpot_s is None


def test_percentiles_lie_between_ranks() -> None:
    found = distribution([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {
        "mean": 3.0, "p50": 3.0, "p90": pytest.approx(4.6), "p95": pytest.approx(4.8),
        "p99": pytest.approx(4.96), "max": 5.0,
    }  # fmt: skip
    assert distribution([]) is None


def test_good_requests_keep_every_bound_and_failed_ones_are_never_good() -> None:
    quick = make_record(0.1, 0.2)  # TTFT 100 ms, TPOT 100 ms, E2EL 200 ms
    slow_start = make_record(0.3, 0.35)
    slow_tokens = make_record(0.1, 0.4)
    single = make_record(0.1)  # has no TPOT to miss
    failed = make_failure("http_503", "overloaded")
    records = [quick, slow_start, slow_tokens, single, failed]
    slos_ms = {"ttft": 200, "tpot": 150}
    assert [record.meets(slos_ms) for record in records] == [True, False, False, True, False]
    assert quick.meets({"e2el": 200})
    assert not quick.meets({"e2el": 199})
    result = summarize(records, 2.0, slos_ms)
    assert result["num_good"] == 2
    assert result["goodput_requests_per_s"] == 1.0
    assert summarize(records, 2.0, {})["goodput_requests_per_s"] is None


def test_a_summary_adds_up_what_succeeded_and_counts_what_did_not() -> None:
    told = make_record(0.1, 0.2, num_output_tokens=6)
    told.num_prompt_tokens, told.num_cached_tokens = 30, 10
    told.skipped_ffn_blocks, told.total_ffn_blocks, told.skipped_ffn_share = 10, 40, 0.5
    more = make_record(0.1, 0.2)
    more.total_ffn_blocks, more.skipped_ffn_share = 10, 0.25
    both = summarize([told, more], 4.0, {})
    assert both["token_skip_ratio"] == 10 / 50
    assert both["skipped_ffn_share"] == (20 + 2.5) / 50
    untold = make_record(0.3, 0.4)
    untold.num_prompt_tokens = 10
    failures = [make_failure("http_503", text) for text in ("first", "second")]
    result = summarize([told, *failures, make_failure("timeout", "t"), untold], 4.0, {})
    assert (result["num_ok"], result["num_failed"]) == (2, 3)
    assert result["errors"] == {
        "http_503": {"count": 2, "example": "first"},
        "timeout": {"count": 1, "example": "t"},
    }
    assert result["requests_per_s"] == 0.5
    assert result["output_tokens_per_s"] == (6 + 2) / 4
    assert result["total_tokens_per_s"] == (6 + 2 + 40) / 4
    assert result["num_without_usage"] == 1
    assert result["cached_token_ratio"] == 0.25
    assert result["token_skip_ratio"] == 0.25
    assert result["skipped_ffn_share"] == 0.5
    assert result["ttft_ms"]["mean"] == pytest.approx(200)


def test_a_summary_of_failures_alone_has_no_latencies() -> None:
    result = summarize([make_failure("timeout", "t")], 1.0, {"ttft": 100})
    assert result["ttft_ms"] is result["itl_ms"] is result["token_skip_ratio"] is None
    assert result["skipped_ffn_share"] is None
    assert result["goodput_requests_per_s"] == 0


def test_arrivals_are_a_poisson_process_that_its_seed_repeats() -> None:
    arrivals_s = poisson_arrivals(20_000, rate=50.0, seed=1)
    assert arrivals_s == poisson_arrivals(20_000, rate=50.0, seed=1)
    assert arrivals_s[:5] != poisson_arrivals(5, rate=50.0, seed=2)
    assert arrivals_s[0] == 0
    gaps_s = [b - a for a, b in pairwise(arrivals_s)]
    assert min(gaps_s) > 0
    assert sum(gaps_s) / len(gaps_s) == pytest.approx(1 / 50, rel=0.03)
    # Of exponential gaps, 1 - 1/e are shorter than the mean.
    assert sum(gap_s < 1 / 50 for gap_s in gaps_s) / len(gaps_s) == pytest.approx(0.632, abs=0.02)


async def test_an_open_loop_sends_on_while_earlier_requests_hang() -> None:
    sent: list[int] = []
    everything_sent = asyncio.Event()

    async def send(item: int, intended_s: float) -> None:
        sent.append(item)
        if len(sent) == 5:
            everything_sent.set()
        await everything_sent.wait()

    await asyncio.wait_for(open_loop(range(5), [0.001 * i for i in range(5)], send), 10)
    assert sent == [0, 1, 2, 3, 4]


async def test_an_open_loop_that_is_late_still_tells_the_intended_times() -> None:
    intended: list[float] = []
    lags_s: list[float] = []

    async def send(item: int, intended_s: float) -> None:
        intended.append(intended_s)
        lags_s.append(time.monotonic() - intended_s)
        if item == 0:
            time.sleep(0.2)  # noqa: ASYNC251  # a client that has no time

    await open_loop(range(3), [0.0, 0.01, 0.02], send)
    assert intended == pytest.approx([intended[0], intended[0] + 0.01, intended[0] + 0.02])
    assert min(lags_s) >= 0
    assert lags_s[1] >= 0.18


async def test_a_closed_loop_keeps_its_number_of_requests_under_way() -> None:
    num_running = 0
    seen: list[int] = []

    async def send(item: int, intended_s: float) -> None:
        nonlocal num_running
        num_running += 1
        seen.append(num_running)
        await asyncio.sleep(0.001 * (item % 3))
        num_running -= 1

    await closed_loop(range(20), 4, send)
    assert len(seen) == 20
    assert max(seen) == 4
    assert set(seen[3:]) == {4}
