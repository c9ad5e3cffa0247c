"""What clients and operators are told of the prefix cache."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import launch
from server.cli.app import app
from server.settings import Settings
from server.settings_sources import load_settings
from tests.server.conftest import Server, running
from tests.server.test_answers import events

LONG = "Tell me about " + "the quick brown fox " * 3  # blocks are of 16 tokens, tokens are bytes


def cached(usage: dict[str, Any]) -> int:
    num_tokens: int = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= num_tokens < usage["prompt_tokens"]
    return num_tokens


def blocks(num_tokens: int) -> int:
    """How much of a prompt can be cached: whole blocks, and not its last token."""
    return (num_tokens - 1) // 16 * 16


async def test_a_second_turn_has_the_first_turns_prompt_for_nothing(server: Server) -> None:
    first = (await server.chat(LONG, max_tokens=5)).json()
    assert cached(first["usage"]) == 0
    messages = [
        {"role": "user", "content": LONG},
        first["choices"][0]["message"],
        {"role": "user", "content": "And?"},
    ]
    second = (await server.post("/v1/chat/completions", {"messages": messages})).json()
    assert cached(second["usage"]) == blocks(first["usage"]["prompt_tokens"])


async def test_streams_and_completions_tell_it_too(server: Server) -> None:
    usage = (await server.complete(LONG, max_tokens=2)).json()["usage"]
    most = blocks(usage["prompt_tokens"])
    assert cached(usage) == 0
    assert cached((await server.complete(LONG, max_tokens=2)).json()["usage"]) == most
    options = {"include_usage": True, "continuous_usage_stats": True}
    for _ in range(2):
        reply = await server.complete(LONG, max_tokens=3, stream=True, stream_options=options)
        assert {cached(chunk["usage"]) for chunk in events(reply.text)} == {most}
    options = {"include_usage": True}
    reply = await server.chat(LONG, max_tokens=3, stream=True, stream_options=options)
    assert cached(events(reply.text)[-1]["usage"]) == 0, "chat prompts begin otherwise"
    reply = await server.chat(LONG, max_tokens=3, stream=True, stream_options=options)
    assert cached(events(reply.text)[-1]["usage"]) > most


async def test_prompts_of_another_salt_share_nothing(server: Server) -> None:
    async def num_cached(**salt: str) -> int:
        return cached((await server.complete(LONG, max_tokens=1, **salt)).json()["usage"])

    assert await num_cached() == 0
    assert await num_cached(cache_salt="a") == 0
    assert await num_cached(cache_salt="b") == 0
    assert await num_cached() == await num_cached(cache_salt="a") > 0
    assert (await server.complete(cache_salt="")).status_code == 400


async def test_each_prompt_counts_once_with_what_its_first_choice_found() -> None:
    """As prompt_tokens does. What the later choices found, the first had just computed."""
    async with running(max_num_seqs=1) as server:  # one choice after the other
        prompts = [LONG, LONG.upper()]
        usage = (await server.complete(prompts, n=3, max_tokens=2)).json()["usage"]
        assert cached(usage) == 0
        usage = (await server.complete(prompts, n=3, max_tokens=2)).json()["usage"]
        assert cached(usage) == 2 * blocks(usage["prompt_tokens"] // 2)


async def test_metrics_and_the_log_agree_with_the_usage(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="server.metrics")
    usages = [(await server.complete(LONG, max_tokens=2)).json()["usage"] for _ in range(3)]
    text = (await server.http.get("/metrics")).text
    num_queries = sum(usage["prompt_tokens"] for usage in usages)
    assert f"skipllm_prefix_cache_queries_total {num_queries:.1f}" in text
    assert f"skipllm_prefix_cache_hits_total {sum(map(cached, usages)):.1f}" in text
    logged = [record.__dict__["cached_tokens"] for record in caplog.records]
    assert logged == [cached(usage) for usage in usages]


def test_the_command_line_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(launch, "run_server", lambda settings: seen.append(settings) or 0)
    for args in ([], ["--no-enable-prefix-caching"], ["--enable-prefix-caching"]):
        assert CliRunner().invoke(app, ["serve", *args]).exit_code == 0
    assert [settings.enable_prefix_caching for settings in seen] == [True, False, True]
    assert not load_settings({}, {"SKIPLLM_ENABLE_PREFIX_CACHING": "false"}).enable_prefix_caching
