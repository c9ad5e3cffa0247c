"""`skipllm bench serve` against the real application, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from server.cli.bench.report import print_report
from server.cli.bench.serving import Benchmark, measure
from server.settings import SettingsError
from skipllm_core.errors import ConfigError
from tests.bench.other_servers import begin, chunk, other_server
from tests.server.conftest import Server, listening, make_profile, running

BENCHMARK = Benchmark(
    base_url="",
    endpoint="/v1/completions",
    model=None,
    num_prompts=6,
    request_rate=None,
    max_concurrency=3,
    input_len=10,
    output_len=5,
    prompts=None,
    ignore_eos=True,
    temperature=0.0,
    extra_body={},
    slos_ms={},
    seed=0,
    num_warmups=0,
    timeout_s=30.0,
)


async def bench(url: str, **options: Any) -> dict[str, Any]:
    return await measure(replace(BENCHMARK, base_url=url, **options), Console(file=io.StringIO()))


def report(result: dict[str, Any]) -> str:
    out = io.StringIO()
    print_report(result, Console(file=out, width=100))
    return out.getvalue()


@pytest.fixture
async def live() -> AsyncIterator[tuple[Server, str]]:
    runner = {"step_s": 0.003}  # or tokens would come together
    async with (
        running(skip_profile=make_profile(), runner=runner) as server,
        listening(server.app) as url,
    ):
        yield server, url


# A server of ours --------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [{}, {"request_rate": 200.0}])
@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
async def test_the_counts_are_those_of_the_server(
    live: tuple[Server, str], endpoint: str, load: dict[str, Any]
) -> None:
    server, url = live
    result = await bench(url, endpoint=endpoint, num_warmups=2, **load)
    assert (result["num_ok"], result["num_failed"]) == (6, 0)
    assert result["num_output_tokens"] == 6 * 5
    assert result["num_without_usage"] == 0
    assert result["model"] == "fake"
    metrics = (await server.http.get("/metrics")).text
    assert "skipllm_generated_tokens_total 40.0" in metrics  # with the warm-ups'
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2el_ms"):
        assert result[name]["max"] > 0
    if endpoint == "/v1/completions":
        assert result["num_prompt_tokens"] == 6 * 10


async def test_prompts_and_so_answers_repeat_with_the_seed(live: tuple[Server, str]) -> None:
    server, url = live

    async def prompts_of(seed: int) -> list[list[int]]:
        server.runner.batches.clear()
        await bench(url, seed=seed, output_len=1, max_concurrency=1)
        return [
            row.seq.token_ids[:10]
            for batch in server.runner.batches
            for row in batch.rows
            if batch.kind == "prefill"
        ]

    first = await prompts_of(1)
    assert len(first) == 6
    assert first == await prompts_of(1)
    assert first != await prompts_of(2)


async def test_what_was_skipped_and_how_long_the_engine_ran_are_told(
    live: tuple[Server, str],
) -> None:
    _, url = live
    # Of 4 tokens decoded, 2 warm up; of 4 layers, the fake runner then skips one.
    asked = {"skip": {"ratio": 0.25, "warmup_tokens": 3}}
    result = await bench(url, extra_body=asked, max_concurrency=1)
    assert result["token_skip_ratio"] == 2 / 16
    assert result["weight_skip_ratio"] == 2 / 16
    assert set(result["engine_time_ratio"]) == {"prefill", "decode"}
    assert 0 < sum(result["engine_time_ratio"].values()) < 1
    assert result["skipped_ffn_share"] == 2 / 16
    told = "skipped_ffn_share 0.125, token_skip_ratio 0.125, weight_skip_ratio 0.125"
    assert told in report(result)
    assert result["settings"]["extra_body"] == asked
    unskipped = await bench(url, extra_body={"skip": {"policy": "off"}})
    assert unskipped["token_skip_ratio"] == unskipped["weight_skip_ratio"] == 0
    # Of 4 layers with 48 rows of weights, the fake runner leaves out 7, 9, 11 and 13.
    asked = {"skip": {"policy": "neurons", "ratio": 0.25, "warmup_tokens": 3}}
    neurons = await bench(url, extra_body=asked, max_concurrency=1)
    assert neurons["token_skip_ratio"] == 0
    share = 2 * (7 + 9 + 11 + 13) / (4 * 4 * 48)
    assert neurons["skipped_ffn_share"] == pytest.approx(share)
    assert neurons["weight_skip_ratio"] == pytest.approx(share)


async def test_prompts_come_from_a_file_and_are_repeated(
    live: tuple[Server, str], tmp_path: Path
) -> None:
    _, url = live
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abc"}\n\n{"prompt": "defgh"}\n')
    result = await bench(url, prompts=file)
    assert result["num_prompt_tokens"] == 3 * (1 + 3) + 3 * (1 + 5)  # and <s>
    assert result["settings"]["prompts"] == str(file)
    assert "input_len" not in result["settings"]
    result = await bench(url, prompts=file, endpoint="/v1/chat/completions")
    assert result["num_ok"] == 6
    file.write_text('{"messages": [{"role": "user", "content": "abc"}]}')
    assert (await bench(url, prompts=file, endpoint="/v1/chat/completions"))["num_ok"] == 6
    with pytest.raises(SettingsError, match=r"line 1: messages need --endpoint"):
        await bench(url, prompts=file)
    file.write_text("\n")
    with pytest.raises(SettingsError, match="has no prompts"):
        await bench(url, prompts=file)


async def test_a_full_queue_is_an_error_with_its_status() -> None:
    async with (
        running(max_num_seqs=1, max_num_queued_reqs=1, runner={"step_s": 0.005}) as server,
        listening(server.app) as url,
    ):
        result = await bench(url, max_concurrency=6, slos_ms={"e2el": 60_000})
    assert result["num_ok"] >= 1
    assert result["num_failed"] == 6 - result["num_ok"] > 0
    assert result["errors"]["http_503"]["count"] == result["num_failed"]
    assert result["num_good"] == result["num_ok"]
    assert "The engine is currently overloaded" in report(result)


async def test_a_refused_warm_up_ends_the_benchmark(live: tuple[Server, str]) -> None:
    _, url = live
    with pytest.raises(ConfigError, match=r"the warm-up failed: http_400: .*'n'"):
        await bench(url, extra_body={"n": 0}, num_warmups=1)


async def test_a_key_is_sent_and_its_lack_is_told_but_never_written() -> None:
    async with running(api_keys=("secret",)) as server, listening(server.app) as url:
        with pytest.raises(ConfigError, match=r"answers 401: .*API key"):
            await bench(url)
        result = await bench(url, api_key="secret")
    assert result["num_ok"] == 6
    assert "secret" not in json.dumps(result)


# Other servers -----------------------------------------------------------------------------------


async def test_a_server_that_tells_no_usage_is_measured_by_its_chunks() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        assert isinstance((await request.json())["prompt"], str)  # it has no /tokenize
        return await begin(request, chunk("a"), chunk("b"), chunk("", "length"), "[DONE]")

    async with other_server(answer) as url:
        result = await bench(url + "/v1/")
    assert (result["num_ok"], result["num_output_tokens"], result["num_without_usage"]) == (
        6,
        12,
        6,
    )
    told = report(result)
    assert "other at http://127.0.0.1" in told
    assert "told no usage" in told
    for name in (
        "skipped_ffn_share",
        "token_skip_ratio",
        "weight_skip_ratio",
        "engine_time_ratio",
        "cached",
    ):
        assert name not in told
    assert result["token_skip_ratio"] is result["weight_skip_ratio"] is None
    assert result["engine_time_ratio"] is result["cached_token_ratio"] is None


async def test_every_way_to_fail_has_its_name() -> None:
    num_asked = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal num_asked
        num_asked += 1
        match num_asked:
            case 1:
                return await begin(request, chunk("a"), {"error": {"message": "out of luck"}})
            case 2:
                return await begin(request, chunk("a"))
            case 3:
                response = await begin(request, chunk("a"))
                assert request.transport is not None
                request.transport.abort()
                return response
            case 4:
                await begin(request, chunk("a"))
                await asyncio.sleep(60)
            case 5:
                return await begin(request, "no JSON", "[DONE]")
            case 6:
                return web.Response(status=502, text="<html>Bad Gateway</html>")
            case 7:
                assert request.transport is not None
                request.transport.abort()
        return await begin(request, chunk("a"), "[DONE]")

    async with other_server(answer) as url:
        result = await bench(url, num_prompts=8, max_concurrency=1, timeout_s=0.5)
    assert result["num_ok"] == 1
    assert {name: error["count"] for name, error in result["errors"].items()} == {
        "error_event": 1, "truncated": 2, "timeout": 1, "malformed": 1, "http_502": 1,
        "connection": 1,
    }  # fmt: skip
    assert result["errors"]["error_event"]["example"] == "out of luck"
    assert result["errors"]["truncated"]["example"] == "the stream ended without [DONE]"
    assert "Bad Gateway" in report(result)


async def test_an_open_loop_shows_the_wait_that_a_closed_loop_hides() -> None:
    """One stall of 0.5 s: everybody who was to come meanwhile has waited, not the first alone."""

    @asynccontextmanager
    async def stalling() -> AsyncIterator[str]:
        one_at_a_time = asyncio.Lock()
        has_stalled = False

        async def answer(request: web.Request) -> web.StreamResponse:
            nonlocal has_stalled
            async with one_at_a_time:
                if not has_stalled:
                    has_stalled = True
                    await asyncio.sleep(0.5)
                return await begin(request, chunk("a"), chunk("b"), "[DONE]")

        async with other_server(answer) as url:
            yield url

    async with stalling() as url:
        closed = await bench(url, max_concurrency=1, slos_ms={"ttft": 400})
    async with stalling() as url:
        opened = await bench(url, request_rate=1000.0, slos_ms={"ttft": 400})
    assert closed["num_good"] == 5
    assert opened["num_good"] == 0
    assert opened["ttft_ms"]["p50"] > 400


async def test_events_are_read_however_they_are_cut() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await begin(request)
        whole = (
            f"data: {json.dumps(chunk('a'))}\n\ndata:{json.dumps(chunk('b'))}\n\ndata: [DONE]\n\n"
        )
        for byte in whole.encode():
            await response.write(bytes([byte]))
        return response

    async with other_server(answer) as url:
        result = await bench(url, num_prompts=1)
    assert (result["num_ok"], result["num_output_tokens"]) == (1, 2)
