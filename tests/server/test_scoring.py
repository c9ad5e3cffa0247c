"""What is told of prompts: echoes with log-probabilities, and vLLM's prompt_logprobs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from server.protocol import sampling
from skipllm_core.engine.runner import Batch, StepResult
from skipllm_core.sequence import Sequence
from skipllm_core.tokenizer import ByteTokenizer
from skipllm_core.types import TokenLogprobs
from tests.fakes import FakeRunner
from tests.server.conftest import Server, running
from tests.server.test_answers import Opinionated, events

BOS = ByteTokenizer.BOS
IDS = [BOS, *b"abc"]


def legacy(choice: dict[str, Any]) -> list[tuple[str, float | None, int]]:
    """Token, log-probability and offset of each entry."""
    found = choice["logprobs"]
    assert len(found["top_logprobs"]) == len(found["tokens"])
    return list(zip(found["tokens"], found["token_logprobs"], found["text_offset"], strict=True))


ECHOED = [("<s>", None, 0), ("a", -0.25, 0), ("b", -0.5, 1), ("c", -0.75, 2)]


async def test_an_echo_with_logprobs_tells_of_the_prompt_and_the_answer() -> None:
    async with running(runner_type=Opinionated) as server:
        content = (await server.complete("abc", echo=True, logprobs=2, max_tokens=2)).json()
    (choice,) = content["choices"]
    assert choice["text"] == "abcde"
    assert legacy(choice) == [*ECHOED, ("d", -0.5, 3), ("e", -0.5, 4)]
    assert choice["logprobs"]["top_logprobs"][:3] == [
        None,
        {"\x07": -0.25, "a": -0.25},
        {"\x07": -0.25, "b": -0.5},
    ]
    assert choice["logprobs"]["top_logprobs"][4] == {"d": -0.5, "bytes:\\xc3": -2.0}
    assert content["usage"]["prompt_tokens"] == 4
    assert content["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("prompt", ["abc", IDS])
@pytest.mark.parametrize("logprobs", [None, 0, 1])
async def test_without_tokens_an_echo_is_the_prompt_alone(
    server: Server, prompt: Any, logprobs: int | None
) -> None:
    reply = await server.complete(prompt, echo=True, logprobs=logprobs, max_tokens=0)
    assert reply.status_code == 200
    content = reply.json()
    (choice,) = content["choices"]
    shift = 0 if prompt == "abc" else 3  # ids read as they are: with their begin of sequence
    assert choice["text"] == "<s>abc"[3 - shift :]
    assert choice["finish_reason"] == "length"
    if logprobs is None:
        assert choice["logprobs"] is None
    else:
        first, *rest = ECHOED
        assert legacy(choice) == [first, *((t, value, o + shift) for t, value, o in rest)]
    usage = content["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 0, 4)


@pytest.mark.parametrize("body", [{}, {"logprobs": 1}, {"echo": False}])
async def test_nothing_to_generate_and_nothing_to_tell_is_refused(
    server: Server, body: dict[str, Any]
) -> None:
    reply = await server.complete("abc", max_tokens=0, **body)
    assert reply.status_code == 400
    assert reply.json()["error"] == {
        "message": "Invalid 'max_tokens': integer below minimum value. "
        "Expected a value >= 1, but got 0 instead.",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": "integer_below_min_value",
    }
    assert (await server.chat(max_tokens=0, prompt_logprobs=1)).status_code == 400


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("prompt", ["é🦊x", [*"é🦊x".encode()], [97]])
async def test_a_stream_joins_to_the_whole_answer(prompt: Any, max_tokens: int) -> None:
    async with running(runner_type=Opinionated) as server:
        options = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "prompt_logprobs": 1}
        (whole,) = (await server.complete(prompt, **options)).json()["choices"]
        chunks = events((await server.complete(prompt, stream=True, **options)).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for key in whole["logprobs"]:
        joined = [entry for choice in choices for entry in choice["logprobs"][key]]
        assert joined == whole["logprobs"][key]
    assert choices[0]["prompt_logprobs"] == whole["prompt_logprobs"]
    assert all("prompt_logprobs" not in choice for choice in choices[1:])
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "length"


async def test_tokens_within_a_character_share_its_offset(server: Server) -> None:
    ids = [*"é🦊x".encode()]
    (choice,) = (await server.complete(ids, echo=True, logprobs=0, max_tokens=0)).json()["choices"]
    assert choice["text"] == "é🦊x"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 1, 2]


async def test_each_choice_of_each_prompt_has_its_own(server: Server) -> None:
    options: dict[str, Any] = {"echo": True, "logprobs": 0, "max_tokens": 0, "n": 2}
    content = (await server.complete(["ab", "x"], **options)).json()
    texts = [[token for token, _, _ in legacy(choice)] for choice in content["choices"]]
    assert texts == [["<s>", "a", "b"]] * 2 + [["<s>", "x"]] * 2
    chunks = events((await server.complete(["ab", "x"], stream=True, **options)).text)
    streamed = sorted((chunk["choices"][0] for chunk in chunks), key=lambda choice: choice["index"])
    assert [legacy(choice) for choice in streamed] == [legacy(c) for c in content["choices"]]


class Ending(FakeRunner):
    """Says the end of the sequence at once, and how likely that was."""

    def run(self, batch: Batch) -> StepResult:
        result = super().run(batch)
        rows = [
            row if row.token_id is None else replace(row, logprobs=TokenLogprobs(-0.125, (), ()))
            for row in result.rows
        ]
        return replace(result, rows=tuple(rows))


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_tells_of_the_token_that_ended_the_answer_too(stream: bool) -> None:
    """Who scores a prompt, as lm-eval does, takes the last entry for the token generated."""

    def end(seq: Sequence) -> int:
        return ByteTokenizer.EOS

    async with running(end, runner_type=Ending) as server:
        options: dict[str, Any] = {"logprobs": 0, "max_tokens": 1, "stream": stream}
        echoed = await server.complete("abc", echo=True, **options)
        plain = await server.complete("abc", **options)
    contents = [events(r.text)[-1] if stream else r.json() for r in (echoed, plain)]
    (choice,), (without,) = (content["choices"] for content in contents)
    assert legacy(choice) == [*ECHOED, ("</s>", -0.125, 3)]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "stop")
    assert legacy(without) == []


VLLMS = [
    None,
    {
        "97": {"logprob": -0.25, "rank": 2, "decoded_token": "a"},
        "7": {"logprob": -0.25, "rank": 1, "decoded_token": "\x07"},
    },
    {
        "98": {"logprob": -0.5, "rank": 2, "decoded_token": "b"},
        "7": {"logprob": -0.25, "rank": 1, "decoded_token": "\x07"},
    },
]


async def test_prompt_logprobs_have_vllms_form_in_a_completions_choices(server: Server) -> None:
    options: dict[str, Any] = {"prompt_logprobs": 1, "max_tokens": 2}
    (choice,) = (await server.complete([BOS, *b"ab"], **options)).json()["choices"]
    assert choice["prompt_logprobs"] == VLLMS
    assert choice["logprobs"] is None
    assert choice["text"] == "cd"
    options["max_tokens"] = 0
    (choice,) = (await server.complete([BOS, *b"ab"], **options)).json()["choices"]
    assert (choice["text"], choice["prompt_logprobs"]) == ("", VLLMS)


async def test_each_form_tells_as_many_alternatives_as_it_was_asked_for(server: Server) -> None:
    options: dict[str, Any] = {"echo": True, "logprobs": 0, "prompt_logprobs": 3, "max_tokens": 0}
    (choice,) = (await server.complete("a", **options)).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"a": -0.25}]
    assert list(choice["prompt_logprobs"][1]) == ["97", "7", "300"]


async def test_prompt_logprobs_stand_at_the_top_of_a_chats_answer(server: Server) -> None:
    prompt_ids = ByteTokenizer().encode("user: hi\nassistant: ")
    content = (await server.chat(prompt_logprobs=0, max_tokens=1)).json()
    assert [list(entry or {}) for entry in content["prompt_logprobs"]] == [
        [],
        *([str(token_id)] for token_id in prompt_ids[1:]),
    ]
    options: dict[str, Any] = {"prompt_logprobs": 0, "max_tokens": 3, "stream": True, "n": 2}
    chunks = events((await server.chat(**options)).text)
    told = [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk]
    assert told == [content["prompt_logprobs"]]


@pytest.mark.parametrize("body", [{}, {"prompt_logprobs": False}, {"prompt_logprobs": None}])
async def test_the_key_is_there_and_null_where_nothing_was_asked(
    server: Server, body: dict[str, Any]
) -> None:
    assert (await server.chat(max_tokens=1, **body)).json()["prompt_logprobs"] is None
    (choice,) = (await server.complete(max_tokens=1, **body)).json()["choices"]
    assert choice["prompt_logprobs"] is None


@pytest.mark.parametrize("value", [-1, 21, "1", True, 1.5])
async def test_prompt_logprobs_out_of_range_are_refused(server: Server, value: Any) -> None:
    reply = await server.chat(prompt_logprobs=value)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
    "body", [{"prompt_logprobs": 4}, {"echo": True, "logprobs": 4}, {"prompt_logprobs": 0, "n": 5}]
)
async def test_what_would_be_too_much_to_tell_is_refused_by_arithmetic(
    server: Server, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(sampling, "MAX_PROMPT_LOGPROBS", 4 * 2 * 5)
    assert (await server.complete(["abc", "abc"], max_tokens=1, **body)).status_code == 200
    server.runner.batches.clear()
    reply = await server.complete(["abc", "abcd"], max_tokens=1, **body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == "too_many_prompt_logprobs"
    assert "at most 40 log-probabilities" in error["message"]
    assert "of each of " in error["message"]
    assert server.runner.batches == []


async def test_a_prompt_may_fill_the_context_where_nothing_is_generated(server: Server) -> None:
    most = server.engine.info.max_model_len
    options: dict[str, Any] = {"echo": True, "logprobs": 0, "max_tokens": 0}
    reply = await server.complete([65] * most, **options)
    assert len(reply.json()["choices"][0]["logprobs"]["tokens"]) == most
    for ids, body in (([65] * (most + 1), options), ([65] * most, {"max_tokens": 1})):
        error = (await server.complete(ids, **body)).json()["error"]
        assert error["code"] == "context_length_exceeded"


async def test_a_truncated_prompt_is_told_of_as_it_was_used(server: Server) -> None:
    options: dict[str, Any] = {"prompt_logprobs": 0, "truncate_prompt_tokens": 2, "max_tokens": 1}
    (choice,) = (await server.complete("abc", **options)).json()["choices"]
    assert [list(entry or {}) for entry in choice["prompt_logprobs"]] == [[], ["99"]]


async def test_wording_a_long_prompt_does_not_hold_the_event_loop() -> None:
    threads: list[Any] = []
    real = asyncio.to_thread

    async def to_thread(function: Any, *args: Any) -> Any:
        threads.append(function)
        return await real(function, *args)

    async with running(max_model_len=4096, runner={"num_kv_blocks": 400}) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "to_thread", to_thread)
            options: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 1}
            for stream in (False, True):
                threads.clear()
                reply = await server.complete([65] * 3000, stream=stream, **options)
                assert reply.status_code == 200
                assert len(threads) == 1
                threads.clear()
                await server.complete([65] * 30, stream=stream, **options)
                assert threads == []


# Skipping over the prompt ------------------------------------------------------------------------


async def test_skipping_reaches_the_prompt_where_the_request_wishes_it(server: Server) -> None:
    skip = {"ratio": 0.2, "warmup_tokens": 3, "prompt": True}
    options: dict[str, Any] = {"max_tokens": 4, "skip": skip}
    content = (await server.complete("abcdefgh", **options)).json()
    # Eight tokens behind the first and three decode steps; the first two fall into the warm-up.
    assert content["usage"]["skip"] == {
        "skipped_ffn_share": 9 / 44,
        "token_skip_ratio": 9 / 44,
        "skipped_ffn_blocks": 9,
        "total_ffn_blocks": 44,
        "warmup_tokens": 3,
    }
    metrics = (await server.http.get("/metrics")).text
    assert 'skipllm_ffn_blocks_total{layer="2",outcome="skipped"} 9.0' in metrics
    assert 'skipllm_ffn_blocks_total{layer="0",outcome="computed"} 11.0' in metrics


async def test_such_a_prompt_takes_nothing_of_the_cache_and_gives_nothing(server: Server) -> None:
    skipping = {"ratio": 0.2, "prompt": True}
    cached = []
    for skip in (skipping, {"ratio": 0.2}, skipping, {"ratio": 0.2}):
        content = (await server.complete("a" * 40, max_tokens=2, skip=skip)).json()
        cached.append(content["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 0, 0, 32]


async def test_a_wish_for_prompts_that_is_no_boolean_is_refused(server: Server) -> None:
    reply = await server.complete(skip={"prompt": 1})
    assert reply.json()["error"]["param"] == "skip.prompt"
